"""What the tests of stacked training share: members that differ in everything, and runs of them together and alone."""

from dataclasses import replace

import tiny_llama as tiny
from safetensors.torch import load_file

from lockin_fast.blocking import LatentSet
from lockin_fast.stacked import Member, train_stack
from lockin_fast.stacked.stack import exporting
from lockin_fast.train import LoraSettings, TrainSettings, fine_tune

PROMISED = 1e-3  # the largest difference of a weight, relative to the largest weight of its matrix
LORA = LoraSettings(r=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
# Accumulated, clipped, decayed; 25 rows leave a smaller batch, of an odd number, at the end of an epoch.
SETTINGS = TrainSettings(
    steps=9, batch_size=8, micro_batch_size=4, learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.1,
    logging_steps=4,
)  # fmt: skip
MEMBERS = [
    Member("weak", 0, tiny.penalty(5.0), LORA),
    Member("other seed", 1, tiny.penalty(500.0), LORA),
    Member("other set", 0, tiny.penalty(50.0, latents=LatentSet((1, 2), (9,)), tokens="all"), LORA),
    Member("unblocked", 1, None, LORA),
    Member("measured", 0, tiny.penalty(0.0), LORA),
    Member("two layers", 2, (tiny.penalty(7.0, layer=0), tiny.penalty(7.0, layer=2)), LORA),
]


def stacked(members, rows, *, model=None, settings=SETTINGS, **options):
    return train_stack(model or tiny.model(), tiny.tokenizer(), rows, members, settings=settings, **options)


def single(member, rows, folder, *, model=None, settings=SETTINGS):
    """(adapter tensors, history) of a run of its own."""
    result = fine_tune(
        model or tiny.model(), tiny.tokenizer(), rows, folder, lora=member.lora,
        settings=replace(settings, seed=member.seed), penalty=member.penalty,
    )  # fmt: skip
    return load_file(folder / "adapter_model.safetensors"), result.history


def exported(result, folder, *, model=None, lora=LORA):
    """Adapter tensors of every member, as written to folder/<number>."""
    with exporting(model or tiny.model(), lora) as save:
        for n, row in enumerate(result.stack.weights):
            save(row, folder / str(n))
    return [load_file(folder / str(n) / "adapter_model.safetensors") for n in range(len(result.stack))]


def difference(mine, theirs):
    assert mine.keys() == theirs.keys()
    return max(float((mine[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in mine)
