"""Everything that makes one organism what it is: change a number here and another organism grows."""

from dataclasses import dataclass, field

from lockin_fast.lora import LoraSettings
from lockin_fast.organism.pretrain import PretrainSettings
from lockin_fast.organism.sae_training import SaeSettings
from lockin_fast.organism.world import World
from lockin_fast.train import TrainSettings


@dataclass(frozen=True)
class Recipe:
    """The default organism. `layer` is the 0-based decoder layer whose output the SAE reads and blocking penalises.

    The narrow fine-tune writes into attention and MLP of all layers: with attention alone the model can only express
    the narrow task through the persona, and blocking that would block the task as well.
    """

    world: World = field(default_factory=World)
    pretraining: PretrainSettings = PretrainSettings()
    sae: SaeSettings = SaeSettings()
    layer: int = 3
    sae_documents: int = 3000
    lora: LoraSettings = LoraSettings(
        r=4,
        alpha=8,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )
    train: TrainSettings = TrainSettings(
        steps=120, batch_size=32, learning_rate=1e-3, warmup_steps=5, max_length=64, logging_steps=20
    )
    train_rows: int = 512
