"""A local Hugging Face model as a judge."""

from pathlib import Path
from typing import Any

from lockin_fast.generation import generate
from lockin_fast.judge_settings import JudgeSettings
from lockin_fast.judges.rubric import Messages, Rubric, RubricJudge
from lockin_fast.quantized import load_model
from lockin_fast.typed_mapping import ConfigError


def open_model_judge(settings: JudgeSettings) -> RubricJudge:
    """The judge that puts the rubric to the model in the folder `settings.path`, greedily and in batches.

    The folder is checked now; the weights are loaded with the first replies and stay. Raises ConfigError.
    """
    model = LocalModel(settings)
    return RubricJudge(
        settings.name,
        Rubric.load(settings.rubric),
        model.ask,
        leave_out=settings.unreadable == "leave_out",
        patterns=settings.refusals == "patterns",
    )


class LocalModel:
    """Answers conversations with a model of this machine."""

    def __init__(self, settings: JudgeSettings):
        self.settings, self.model = settings.local, None
        self.path: Path = settings.path
        if self.path is None or not (self.path / "config.json").is_file():
            raise ConfigError(f"judge.path: {self.path} holds no config.json; give the folder of a Hugging Face model")
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError("a model as judge needs transformers: pip install 'lockin-fast[train]'") from error
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except (ValueError, OSError) as error:
            raise ConfigError(f"judge.path: {self.path}: {' '.join(str(error).split())}") from error
        if not self.tokenizer.chat_template:
            raise ConfigError(f"judge.path: {self.path} has no chat template; a judge is an instruction-tuned model")

    def ask(self, conversations: list[Messages]) -> list[str]:
        """One greedy answer to each conversation."""
        if self.model is None:
            self.model = self._loaded()
        return generate(
            self.model,
            self.tokenizer,
            conversations,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
        )

    def _loaded(self) -> Any:
        try:
            return load_model(self.path, self.settings.quantization)
        except ImportError:
            raise
        except Exception as error:  # damaged weights raise whatever their reader likes
            raise ConfigError(f"judge.path: {self.path}: {' '.join(str(error).split())}") from error
