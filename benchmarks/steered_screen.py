"""The steering screen of discovery: 80 latents x 2 directions x 40 prompts on the organism, each reply greedy.

    python -m benchmarks.steered_screen [--organism FOLDER] [--rounds 3] [--threads N] [--strength 0.8] [--small]

Providers, on the same model, prompts and vectors (decoder rows of an SAE, both ways, in units of the median residual
norm):

    shared            `SteeredGenerator`: rows of all steerings share batches, and what steering does not change
    latent at a time  a hook adds one vector, `generate` answers all prompts in one batch: 160 calls. The prompts are
                      tokenised and padded once, outside the clock
    many in a batch   the same hook with another vector for every row: batches as large as those of `shared`
    prompt at a time  a hook adds one vector, `generate` answers one prompt: 6,400 calls. Only the first latents'
                      are run; the time of all is that times their number

Interleaved; medians with the least and the most. Before the clock starts, one run of every provider is checked: the
same tokens, row by row, and how many go through the MLPs of the steered layer and of the next one. Written to
results/steered_screen.csv, but for --small. The organism is grown where FOLDER holds none, in some minutes.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import describe, provenance, write_csv

SEED = 0
WANTED_RATIO = 10.0  # over one latent at a time


@dataclass(frozen=True)
class Screen:
    """One problem. vectors [V, d] hold what is added after `layer`; `scale` is their length; sides are its signs."""

    model: object
    tokenizer: object
    prompts: list
    directions: torch.Tensor
    scale: float
    layer: int
    new_tokens: int
    batch_size: int
    first: int  # latents of `prompt at a time`

    @property
    def steerings(self):
        return [(k, side * self.scale) for k in range(len(self.directions)) for side in (1, -1)]

    def rows(self, latents=None):
        from lockin_fast.steering import SteeredRow

        steerings = self.steerings[: None if latents is None else 2 * latents]
        return [SteeredRow(p, k, c) for k, c in steerings for p in range(len(self.prompts))]


class AsNumbers:
    """A tokenizer that decodes to token numbers, end tokens included, so that replies are equal only if tokens are."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *texts, **options):
        return self._tokenizer(*texts, **options)

    def decode(self, tokens, **options):
        kept = [int(token) for token in tokens if int(token) != self._tokenizer.pad_token_id]
        return " ".join(map(str, kept))

    def batch_decode(self, rows, **options):
        return [self.decode(row) for row in rows]


def shared(screen, tokenizer):
    from lockin_fast.steering import SteeredGenerator

    generator = SteeredGenerator(
        screen.model, tokenizer, screen.directions, layer=screen.layer, max_new_tokens=screen.new_tokens,
        batch_size=screen.batch_size,
    )  # fmt: skip
    assert generator.work.fallback is None
    return generator(screen.prompts, screen.rows())


def many_in_a_batch(screen, tokenizer):
    from lockin_fast.steering import generate_by_hook

    return generate_by_hook(
        screen.model, tokenizer, screen.prompts, screen.rows(), screen.directions, layer=screen.layer,
        max_new_tokens=screen.new_tokens, batch_size=screen.batch_size,
    )  # fmt: skip


def by_generate(screen, tokenizer, batches, steerings):
    """Each steering by a hook of its own, as scripts do it; `batches` are tokenised prompts, padded on the left."""
    from lockin_fast.blocking.layers import decoder_layer

    units = torch.nn.functional.normalize(screen.directions, dim=1)
    replies = []
    for k, coefficient in steerings:
        vector = coefficient * units[k]
        handle = decoder_layer(screen.model, screen.layer).register_forward_hook(
            lambda module, inputs, output, vector=vector: output + vector
        )
        with torch.no_grad():
            for batch in batches:
                output = screen.model.generate(**batch, max_new_tokens=screen.new_tokens, do_sample=False)
                replies += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        handle.remove()
    return [reply.strip() for reply in replies]


def providers(screen):
    """{name: (callable of a tokenizer, how many times its work makes the whole screen)}."""
    render = screen.tokenizer.apply_chat_template
    texts = [render(prompt, tokenize=False, add_generation_prompt=True) for prompt in screen.prompts]
    options = {"add_special_tokens": False, "return_tensors": "pt", "padding": True, "padding_side": "left"}

    def encoded(rows):
        return {key: value for key, value in screen.tokenizer(rows, **options).items() if key != "token_type_ids"}

    together, apart = [encoded(texts)], [encoded([text]) for text in texts]
    some = screen.steerings[: 2 * screen.first]
    return {
        "shared": (lambda t: shared(screen, t), 1),
        "latent at a time": (lambda t: by_generate(screen, t, together, screen.steerings), 1),
        "many in a batch": (lambda t: many_in_a_batch(screen, t), 1),
        "prompt at a time": (lambda t: by_generate(screen, t, apart, some), len(screen.directions) / screen.first),
    }


def checked(screen, ways):
    """{name: {"same": share of replies with the tokens of `latent at a time`, "below", "above": tokens through the
    steered layer and the next}}, and how many different replies there are."""
    from lockin_fast.blocking.layers import decoder_layer

    tokens = {}

    def counted(layer, key):
        def see(module, inputs, output):
            tokens[key] += inputs[0].shape[0] * inputs[0].shape[1]

        return decoder_layer(screen.model, layer).mlp.register_forward_hook(see)

    handles = [counted(screen.layer, "below"), counted(screen.layer + 1, "above")]
    found, said = {}, {}
    for name, (run, _) in ways.items():
        tokens |= {"below": 0, "above": 0}
        said[name] = run(AsNumbers(screen.tokenizer))
        found[name] = dict(tokens)
    for handle in handles:
        handle.remove()
    truth = said["latent at a time"]
    for name, replies in said.items():
        found[name]["same"] = sum(a == b for a, b in zip(truth, replies, strict=False)) / len(replies)
    return found, len(set(truth))


def measured(screen, ways, rounds):
    """{name: seconds of the whole screen, one a round}."""
    seconds = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run, times = ways[name]
            begin = time.perf_counter()
            run(screen.tokenizer)
            seconds[name].append(times * (time.perf_counter() - begin))
    return seconds


def opened(options):
    """The screen that the organism's discovery would run, at one strength."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lockin_fast.chat import question, read_chat
    from lockin_fast.config import load_config
    from lockin_fast.discovery.steered import median_residual_norm
    from lockin_fast.inputs import sae_path
    from lockin_fast.sae import load_sae

    config = load_config(options.organism / "config.yaml")
    model = AutoModelForCausalLM.from_pretrained(config.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    torch.manual_seed(SEED)
    records = read_chat(config.data.core)
    records = [records[i] for i in torch.randperm(len(records))[: options.prompts].tolist()]
    decoder = load_sae(sae_path(config)).decoder
    directions = decoder[torch.randperm(len(decoder))[: options.latents]].float()
    norm = median_residual_norm(model, tokenizer, records, config.block.layer)
    return Screen(
        model, tokenizer, [question(record) for record in records], directions, options.strength * norm,
        config.block.layer, config.generation.max_new_tokens, options.batch_size, min(options.first, options.latents),
    )  # fmt: skip


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.small:
        options.latents, options.prompts, options.rounds, options.first = 4, 10, 1, 1
    if options.threads:
        torch.set_num_threads(options.threads)
    if not (options.organism / "config.yaml").exists():
        from lockin_fast.organism import build

        print(f"growing the organism in {options.organism}")
        build(options.organism, seed=SEED)
    print(describe(provenance()))
    screen = opened(options)
    ways = providers(screen)
    found, kinds = checked(screen, ways)
    prompt_tokens = sum(len(screen.tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"])
                        for p in screen.prompts)  # fmt: skip
    print(f"\n{len(screen.rows())} replies, {kinds} kinds of them; {prompt_tokens} prompt tokens")
    seconds = measured(screen, ways, options.rounds)
    ours = statistics.median(seconds["shared"])
    rows = []
    for name, runs in seconds.items():
        ratio = statistics.median(runs) / ours
        times = ways[name][1]
        rows.append({
            "provider": name, "seconds": round(statistics.median(runs), 3), "low": round(min(runs), 3),
            "high": round(max(runs), 3), "this_over_shared": round(ratio, 2),
            "wanted": WANTED_RATIO if name == "latent at a time" else "", "same_tokens": found[name]["same"],
            "tokens_below": round(found[name]["below"] * times), "tokens_above": round(found[name]["above"] * times),
            "latents": len(screen.directions), "prompts": len(screen.prompts), "strength": options.strength,
            "batch_size": screen.batch_size, "prompt_tokens": prompt_tokens, "scaled": times,
        })  # fmt: skip
        scaled = f" (x {times:.0f})" if times > 1 else ""
        print(f"  {name:<17}{rows[-1]['seconds']:9.2f} s ({min(runs):.2f} to {max(runs):.2f}){scaled}  {ratio:7.2f}x  "
              f"same tokens {found[name]['same']:.2%}; tokens through the steered layer {rows[-1]['tokens_below']}, "
              f"through the next {rows[-1]['tokens_above']}")  # fmt: skip
    if not options.small:
        print(f" written to {write_csv('steered_screen', rows)}")


def parser():
    made = argparse.ArgumentParser(prog="benchmarks.steered_screen", description=__doc__.splitlines()[0])
    made.add_argument("--organism", type=Path, default=Path("benchmark-organism"))
    made.add_argument("--latents", type=int, default=80)
    made.add_argument("--prompts", type=int, default=40)
    made.add_argument("--strength", type=float, default=0.8, help="in units of the median residual norm")
    made.add_argument("--batch-size", type=int, default=1024)
    made.add_argument("--first", type=int, default=2, help="latents that `prompt at a time` is run for")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=0, help="torch's own number when 0")
    made.add_argument("--small", action="store_true", help="a few replies, and nothing is written")
    return made


if __name__ == "__main__":
    main()
