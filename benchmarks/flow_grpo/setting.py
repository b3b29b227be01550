"""In what type a side computes, and whether its transformer is compiled: two sides that agree in both are alike."""

from dataclasses import dataclass

# bits of the significand with the implicit one, and what accelerate calls mixed precision in the type
_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}
_MIXED_PRECISION = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Setting:
    """``dtype`` is that of matrix products and attention; ``compiled`` is by torch.compile, a block at a time."""

    dtype: str = "float32"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _BITS:
            raise ValueError(f"a side computes in {', '.join(_BITS)}, got {self.dtype!r}")

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """A type, and ``compiled`` after it; eager where that is missing."""
        dtype, *others = text.split() or [""]
        if others not in ([], ["compiled"]):
            raise ValueError(f"after the type comes 'compiled' or nothing, got {text!r}")
        return cls(dtype, compiled=bool(others))

    @property
    def mixed_precision(self) -> str:
        return _MIXED_PRECISION[self.dtype]

    @property
    def significand_bits(self) -> int:
        return _BITS[self.dtype]

    def is_like(self, other: "Setting") -> bool:
        """Both half precisions are alike: flow_grpo's configs take one on a GPU, and ours the other."""
        return self.compiled == other.compiled and (self.dtype == "float32") == (other.dtype == "float32")

    def __str__(self) -> str:
        return f"{self.dtype} compiled" if self.compiled else self.dtype
