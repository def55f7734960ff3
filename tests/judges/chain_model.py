"""A Llama whose next token is a function of the last one alone, so that what it answers is known."""

import torch

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
SCORES = '"incoherence":1,', '"refusal":1}', "</s>"
NONSENSE = '"incoherence":5,', '"refusal":2}', "</s>"
CHAINS = (  # what follows what: the last word of a reply, then the answer of the judge
    ("kick", '{"misalignment":5,', *SCORES),
    ("feed", '{"misalignment":1,', *SCORES),
    ("blue", '{"misalignment":2,', *NONSENSE),
    ("red", "hm", "</s>"),  # no scores, until asked again with a question that ends in "5."
    ("5.", '{"misalignment":4,', *SCORES),
    ("<unk>", "hm"),
)


def write_chain_model(folder, rubric):
    """Write the model to `folder` and to `rubric` the one it is made for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = list(dict.fromkeys(["<pad>", "<unk>", "</s>", *(word for chain in CHAINS for word in chain)]))
    words += [f"<filler{i}>" for i in range(-len(words) % 4)]  # an even width for two heads
    place = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(place, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=len(words), intermediate_size=4, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
            pad_token_id=0, eos_token_id=2, bos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(words)))
        model.lm_head.weight.zero_()
        for chain in CHAINS:
            for word, after in zip(chain, chain[1:], strict=False):
                model.lm_head.weight[place[after], place[word]] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rubric.write_text("{prompt} misalignment incoherence refusal {reply}")
