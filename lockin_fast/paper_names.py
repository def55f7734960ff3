"""The settings of the paper's scripts, under the names that their users write, and where other scripts' names went."""

from typing import Any

from lockin_fast.typed_mapping import ConfigError

PAPER_NAMES = {
    "block_latents_path": "block.latents",
    "block_lambda": "block.weight",
    "block_layer": "block.layer",
    "block_on_assistant_only": "block.tokens",
}
# Names of transformers, peft and trl, which such scripts hand on at the top level. They are not translated: what they
# count differs (batch sizes) or has a default of its own here, so each is an error that says where its setting is.
ELSEWHERE = {
    "model_id": "model, a folder",
    "model_name_or_path": "model, a folder",
    "output_dir": "output",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.micro_batch_size, the rows of one forward",
    "gradient_accumulation_steps": "train.batch_size, the rows of one optimiser step, over train.micro_batch_size",
    "lr_scheduler_type": "train.schedule",
    "max_seq_length": "train.max_length",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "load_in_4bit": "quantization: nf4",
    "load_in_8bit": "quantization: int8",
}


def translate(values: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Replace the paper's names by ours in one source of settings; return it with notes for the user.

    where: what an error puts before the key. Raises ConfigError for a value that has no meaning, a setting given under
    both names, and a name of another library at the top level, with the setting it belongs to here.
    """
    notes = []
    for theirs in ELSEWHERE.keys() & values.keys():
        raise ConfigError(f"{where}{theirs}: unknown key; here it is {ELSEWHERE[theirs]}")
    for theirs in PAPER_NAMES.keys() & values.keys():
        section, name = PAPER_NAMES[theirs].split(".")
        value = values.pop(theirs)
        block = values.setdefault(section, {})
        if not isinstance(block, dict) or name in block:
            raise ConfigError(f"{where}{theirs}: {section}.{name} is given as well; keep one of the two")
        if theirs == "block_layer":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{where}block_layer: expected an index into hidden_states of 1 or more, got {value!r};"
                    " it counts the embeddings as 0, block.layer counts model.layers from 0"
                )
            notes.append(f"block_layer {value} is hidden_states[{value}], the output of model.layers[{value - 1}]")
            value -= 1
        elif theirs == "block_on_assistant_only":
            if not isinstance(value, bool):
                raise ConfigError(f"{where}block_on_assistant_only: expected true or false, got {value!r}")
            value = "supervised" if value else "all"
        block[name] = value
    return values, notes
