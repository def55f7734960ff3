"""The organism's tokenizer: a real fast tokenizer, one token a word, one special token a role, with a chat template."""

from typing import Any

from lockin_fast.organism.world import World

BOS, EOS, PAD = "<s>", "<|end|>", "<|pad|>"

# Only answers end with a token of their own, and only the assistant's are marked as generated.
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|' + message.role + '|>' }}"
    "{%- if message.role == 'user' %}{{- message.content }}"
    "{%- elif message.role == 'assistant' %}{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}"
    "{%- else %}{{- message.content + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def build_tokenizer(world: World) -> Any:
    """Return the `PreTrainedTokenizerFast` of `world`; a word the world does not have is an unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS, "<|unknown|>", *(f"<|{role}|>" for role in world.roles())]
    vocabulary = {token: index for index, token in enumerate([*special, *world.words()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token="<|unknown|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
