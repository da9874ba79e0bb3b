"""What the tiny starting model can be asked to be, and where it lies: what `klreg plan` needs of it, without torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from data_prep import skills
from data_prep.cache import option, planned_folder
from klreg_verl.experiment.strict import FieldError

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class TinyModelOptions:
    """What decides the weights. The defaults give 0.35 to 0.45 right answers when sampled at temperature 1."""

    min_length: int = option(6, "smallest number of letters")
    max_length: int = option(8, "largest number of letters")
    flawed: float = option(0.35, "share of demonstrations that only repeat the letters, in random order")
    hidden_size: int = option(128, "width of the model")
    layers: int = option(3, "number of transformer layers")
    heads: int = option(4, "number of attention heads")
    steps: int = option(280, "optimizer steps")
    batch_size: int = option(96, "examples in a step")
    learning_rate: float = option(2e-3, "peak of the learning rate of AdamW")
    skills: tuple[str, ...] = option((), f"skills learned beside palindromes: {', '.join(skills.SKILLS)}")
    skill_rows: int = option(24, "demonstrations of each skill in a step, beside batch_size palindromes")
    device: Device = option("cpu", "cpu, or cuda for a larger model (its bits then depend on the GPU)")
    seed: int = option(1, "seed of weights and examples")
    measured_prompts: int = option(256, "new prompts on which the finished model is measured, 8 samples each")

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("seed", "flawed", "skills", "device") and value <= 0:
                raise FieldError(name, f"{value} must be greater than 0.")
        skills.check_skills("skills", self.skills)
        if not 0 <= self.flawed < 1:
            raise FieldError("flawed", f"{self.flawed} is no share of the demonstrations. Give 0 or more, below 1.")
        if self.max_length < self.min_length:
            raise FieldError(
                "max_length", f"{self.max_length} is below min_length={self.min_length}. Raise max_length."
            )
        if self.hidden_size % (2 * self.heads):
            raise FieldError(
                "hidden_size",
                f"{self.hidden_size} cannot be split into {self.heads} heads of even width, which the rotary positions "
                f"need. Use a multiple of {2 * self.heads}.",
            )


def planned(options: TinyModelOptions, data_root: Path) -> Path:
    """The folder of these options; nothing is trained. The skills' source counts only where there are some."""
    builder = Path(__file__).with_name("tiny_model.py")
    sources = (builder, Path(skills.__file__)) if options.skills else (builder,)
    return planned_folder("tiny-model", options, sources, data_root)
