"""Reader of Goodfire's SAEs: one ``.pth`` or ``.pt`` state dict, plain relu, no bias subtracted from the input."""

from pathlib import Path

from lockin_fast.sae.container import SparseAutoencoder
from lockin_fast.sae.normal_form import StoredWeights, to_normal_form, use_unit_decoder
from lockin_fast.sae.options import ReadOptions, refuse_input_scale
from lockin_fast.sae.tensor_file import TensorFile


def read_goodfire(path: Path, options: ReadOptions) -> SparseAutoencoder:
    """z = relu(x encoder_linear.weight^T + encoder_linear.bias); both weights as ``torch.nn.Linear`` stores them.

    ``path`` is the file or a directory with one.
    """
    refuse_input_scale(options, path, "Goodfire SAEs read the residual stream as it is")
    file = TensorFile(_weights_path(path))
    width, d_model = file.shape("encoder_linear.weight", 2)
    index = options.index(width)
    stored = StoredWeights(
        weight=file.rows("encoder_linear.weight", (width, d_model), index),
        bias=file.vector("encoder_linear.bias", width, index),
        decoder=file.columns("decoder_linear.weight", (d_model, width), index),
        decoder_bias=file.vector("decoder_linear.bias", d_model),
    )
    if options.fold_decoder_norm:
        use_unit_decoder(stored)
    metadata = {
        "format": "goodfire",
        "path": str(file.path),
        "architecture": "standard",
        "decoder_norm_folded": bool(options.fold_decoder_norm),
    }
    return to_normal_form(stored, latents=index, width=width, metadata=metadata)


def _weights_path(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(entry for entry in path.iterdir() if entry.suffix in (".pt", ".pth"))
    if len(found) != 1:
        raise ValueError(f"{path}: expected one .pth or .pt file, found {len(found)}; give the file itself")
    return found[0]
