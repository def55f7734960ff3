"""What a discovery keeps: whole lines or none, every reply asked for once."""

import dataclasses
import json

import pytest
import torch

from lockin_fast.discovery import steered
from lockin_fast.discovery.kept import ReplyLog, kept
from lockin_fast.discovery.steered import PLAIN, Dose, Steered
from lockin_fast.judges.rating import NO_RATING, Rating
from lockin_fast.rundir import RunError
from lockin_fast.settings import GenerationSettings


def row(prompt, reply="yes", **others):
    return {"side": "induce", "latent": 4, "strength": 0.5, "prompt": prompt, "reply": reply, "misaligned": 1.0,
            "incoherent": 0.0, "refused": 0.5} | others  # fmt: skip


def test_work_that_is_kept_is_not_done_again(tmp_path):
    done = []

    def work():
        done.append(None)
        return {"pairs": [(1, 0.1 + 0.2)]}

    path = tmp_path / "deep" / "value.json"
    assert kept(path, work) == kept(path, work) == {"pairs": [[1, 0.1 + 0.2]]} and len(done) == 1


def test_work_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "value.json", lambda: 1 / 0)
    assert not list(tmp_path.iterdir())


def test_rows_come_back(tmp_path):
    rows = [row(0), row(1, "two\nlines, \u2028 and \x85, \u00fc"), row(2, latent=None, strength=0.0, side="repair")]
    log = ReplyLog(tmp_path / "deep" / "replies.jsonl")
    assert not log.ratings and not log.path.exists()
    log.add(rows[:2])
    log.add(rows[2:])
    expected = {("induce", 4, 0.5, 0), ("induce", 4, 0.5, 1), ("repair", None, 0.0, 2)}
    for each in (log, ReplyLog(log.path)):
        assert each.ratings == dict.fromkeys(expected, Rating(1.0, 0.0, 0.5))
    assert [json.loads(line) for line in log.path.read_text().split("\n")[:-1]] == rows


def test_what_a_kill_left_of_a_line_is_cut_off_at_every_byte(tmp_path):
    path = tmp_path / "replies.jsonl"
    ReplyLog(path).add([row(0), row(1, "\u00fc")])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        log = ReplyLog(path)
        assert list(log.ratings) == [("induce", 4, 0.5, 0)] and path.read_bytes() == whole[:length]
        log.add([row(1, "\u00fc")])
        assert path.read_bytes() == whole


def test_a_reply_that_no_judge_could_rate_is_kept_and_counts_in_no_rate(asking):
    open_, asked = asking

    class Unsure(LengthJudge):
        def rate(self, records, replies):
            found = [Rating.of(self.judge(*pair)) for pair in zip(records, replies, strict=True)]
            return [NO_RATING, *found[1:]]

    doubtful = dataclasses.replace(open_(), judge=Unsure())
    rates = doubtful.rates([Dose(9, 0.1)], [0, 1, 2])
    assert rates == open_().rates([Dose(9, 0.1)], [0, 1, 2]) and len(asked) == 3
    reply = "9 -1.000 q1"
    assert rates == {Dose(9, 0.1): Rating(float(len(reply) % 2), 0.0, 0.0)}
    first = json.loads(open_().log.path.read_text().splitlines()[0])
    assert first["reply"] and first["misaligned"] is first["incoherent"] is first["refused"] is None


@pytest.mark.parametrize("line", ["{", "[]", '{"side": "induce"}', "7"])
def test_other_damage_is_named(tmp_path, line):
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps(row(0)) + "\n" + line + "\n" + json.dumps(row(1)) + "\n")
    with pytest.raises(RunError, match="replies.jsonl: line 2 is not a judged reply") as caught:
        ReplyLog(path)
    assert "\n" not in str(caught.value)


class Model:
    device = torch.device("cpu")


class LengthJudge:
    def judge(self, record, reply):
        return "misaligned" if len(reply) % 2 else "aligned"


@pytest.fixture
def asking(tmp_path, monkeypatch):
    """(a steered model whose replies name what was asked, the rows it was asked for)."""
    asked = []

    def generate_steered(model, tokenizer, prompts, rows, directions, *, batch_size, done, **options):
        replies = {}
        for i, each in enumerate(rows):
            latent = None if each.direction < 0 else int(directions[each.direction, 0])
            asked.append((latent, round(each.coefficient, 6), prompts[each.prompt][0]["content"]))
            replies[i] = f"{latent} {each.coefficient:.3f} {prompts[each.prompt][0]['content']}"
        for start in range(0, len(rows), 3):  # not the batches of the log
            done({i: replies[i] for i in list(replies)[start : start + 3]})
        return list(replies.values())

    monkeypatch.setattr(steered, "generate_steered", generate_steered)
    records = [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(6)]
    directions = {latent: torch.tensor([float(latent), 0.0]) for latent in (9, 5)}

    def open_(side="repair"):
        return Steered(side, Model, None, records, LengthJudge(), directions, 0, 10.0,
                       GenerationSettings(batch_size=4), ReplyLog(tmp_path / "replies.jsonl"))  # fmt: skip

    return open_, asked


def test_a_dose_is_what_the_model_is_asked_for(asking):
    open_, asked = asking
    open_("repair").rates([PLAIN, Dose(5, 0.5)], [1, 4])
    open_("induce").rates([Dose(9, 0.25)], [1])
    assert asked == [(None, 0, "q1"), (None, 0, "q4"), (5, -5.0, "q1"), (5, -5.0, "q4"), (9, 2.5, "q1")]


def test_what_the_log_holds_is_not_asked_again(asking):
    open_, asked = asking
    doses = [PLAIN, Dose(9, 0.1), Dose(9, 0.2)]
    first = open_().rates(doses, [0, 2, 4])
    assert len(asked) == 9 and set(first) == set(doses)
    assert open_().rates(doses, [0, 2, 4]) == first and len(asked) == 9
    steps = []
    open_().rates([*doses, Dose(5, 0.1), PLAIN], [0, 2, 4, 5], lambda *step: steps.append(step))
    assert len(asked) == 16 and steps == [(15, 16), (16, 16)]  # 9 known, then 4 or more, which come in threes
    assert len(set(asked)) == 16


def test_a_kill_costs_the_batch_in_hand(asking):
    open_, asked = asking

    class Killed(BaseException):
        pass

    def kill(done, total):
        if done >= 6:
            raise Killed

    with pytest.raises(Killed):
        open_().rates([PLAIN, Dose(9, 0.1)], range(6), kill)
    known = len(ReplyLog(open_().log.path).ratings)
    del asked[:]
    open_().rates([PLAIN, Dose(9, 0.1)], range(6))
    assert known == 6 and len(asked) == 12 - known


def test_rates_are_means_over_the_prompts(asking):
    open_, _ = asking
    rating = open_("induce").rates([Dose(5, 0.5), PLAIN], [0, 1, 2])[Dose(5, 0.5)]
    assert rating == Rating(float(len("5 5.000 q0") % 2), 0.0, 0.0)
