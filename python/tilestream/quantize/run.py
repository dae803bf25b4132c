"""`quantize`: a model and a text -> a directory of 4-bit weights that knows where activations may have 4 bits too."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tilestream.models.config import ModelConfig
from tilestream.models.errors import ModelLoadError
from tilestream.models.fmpq_checkpoint import GROUP_SIZES, QUANT_METHOD, VERSION, FmpqCheckpoint
from tilestream.models.hf_checkpoint import HfCheckpoint
from tilestream.models.loader import OpenCheckpoint, open_checkpoint, resolve
from tilestream.quantize.calibration import gather_statistics
from tilestream.quantize.config_json import config_json
from tilestream.quantize.decoder import Decoder
from tilestream.quantize.gptq import nearest
from tilestream.quantize.head import Head
from tilestream.quantize.layers import RoundedLayer, round_layer, teach_cache
from tilestream.quantize.report import check_can_draw, write_report
from tilestream.quantize.rounding import BLOCK_K
from tilestream.quantize.select import Input, Key, choose_k4, int4_share
from tilestream.quantize.sensitivity import Sensitivity, measure_sensitivity
from tilestream.quantize.source import INPUTS, NORMS, STEMS, Source
from tilestream.quantize.transform import Identity, Statistics, Transform
from tilestream.quantize.tune import num_held_out, tune
from tilestream.quantize.writer import (
    code_tensors,
    key_rounding_tensors,
    new_directory,
    table_tensors,
    write_json,
    write_tensors,
    write_tokenizer,
)

logger = logging.getLogger("tilestream.quantize")

METHODS = ("fmpq", "rtn")

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is being done


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to quantise.

    Args:
        method: "fmpq"; "rtn" rounds to nearest in the model's own basis, for comparison.
        group_size: consecutive input channels with one scale and zero, 32 or 128.
        int4_share: of the decoder's multiply-adds that are to meet INT4 activations, at least; 0 to 1.
        rotate: turn the residual stream and the values; otherwise channels are only sorted. Not with post norms.
        num_windows, window_tokens: of the calibration text.
        tune: let scales, zeros and norms learn the float model's distribution on these windows.
    """

    method: str = "fmpq"
    group_size: int = 128
    int4_share: float = 0.84
    rotate: bool = True
    num_windows: int = 64
    window_tokens: int = 512
    tune: bool = True

    def validate(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; allowed: {', '.join(METHODS)}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is {self.group_size}; allowed: {', '.join(map(str, GROUP_SIZES))}")
        if not 0 <= self.int4_share <= 1:
            raise ValueError(f"int4_share is {self.int4_share}; it must be between 0 and 1")
        if self.num_windows < 1 or self.window_tokens < 2:
            raise ValueError(f"{self.num_windows} windows of {self.window_tokens} tokens; at least 1 of 2 are needed")
        if self.method == "fmpq" and self.tune and self.num_windows < 2:
            raise ValueError("tuning holds windows out, so it needs 2 at least; give 2 (--calib-windows) or leave it out (--no-tune)")


@torch.no_grad()
def quantize(
    model: str | Path, text: str, path: str | Path, recipe: Recipe | None = None, progress: Progress | None = None
) -> float:
    """Quantise a model.

    Args:
        model: an alias, a GGUF file, a Hugging Face directory or a hub id.
        text: to calibrate on, at least recipe.num_windows windows long.
        path: the directory to make.
        recipe: default Recipe().
        progress: called with (steps done, steps in all, what is being done).
    Returns:
        The share of the decoder's multiply-adds that meets INT4 activations.
    Raises:
        ModelLoadError: the model cannot be found, read or quantised.
        ValueError: an option that is not allowed, or too short a text.
        FileExistsError: there is something at `path`.
        ImportError: matplotlib, which draws the report, is not installed.
    """
    recipe = recipe or Recipe()
    recipe.validate()
    check_can_draw()
    found = resolve(str(model))
    source = open_checkpoint(found)
    checkpoint = source.checkpoint
    if isinstance(checkpoint, FmpqCheckpoint) or (isinstance(checkpoint, HfCheckpoint) and checkpoint.is_quantised):
        raise ModelLoadError(f"{found}: this model is quantised already; quantise from its float weights")
    with new_directory(Path(path)) as folder:
        return _Run(source, found, text, recipe, progress, str(model)).write(folder)


class _Run:
    """One model on its way."""

    def __init__(
        self, opened: OpenCheckpoint, found: Path, text: str, recipe: Recipe, progress: Progress | None, name: str
    ) -> None:
        self.source, self.tokenizer = Source(opened.checkpoint, opened.config), opened.tokenizer
        self.config, self.recipe, self.name = self.source.config, recipe, name
        _check_shape(found, self.config)
        self.values = config_json(found, self.config)
        self.windows = _windows(self.tokenizer.encode(text), recipe)
        self.decoder = Decoder(self.config, recipe.window_tokens)
        self._progress, self._done, self._what = progress, 0, ""
        self._facts: dict[str, object] = {}  # for the report

    def _stage(self, what: str) -> None:
        self._what = what
        self._report()

    def _advance(self) -> None:
        self._done += 1
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            num_layers, windows = self.config.num_layers, self.recipe.num_windows
            # Forwards and backwards, and rounding; before that watching, after it tuning and teaching.
            tuning = windows - num_held_out(windows) if self.recipe.tune else 0
            total = 3 * num_layers if self.recipe.method == "rtn" else 5 * num_layers + tuning
            self._progress(self._done, total, self._what)

    def write(self, folder: Path) -> float:
        """Fill the folder."""
        start_s = time.perf_counter()
        config, recipe = self.config, self.recipe
        table = self.source.matrix("token_embd")
        head = self._head(table if config.tied_embeddings else self.source.matrix("output"))
        rotate = recipe.rotate and recipe.method == "fmpq" and not config.post_norms
        if self.source.is_four_bit and (rotate or recipe.group_size != 32):
            logger.warning(
                "%s has 4-bit weights in groups of 32 already; they are rounded again here, and kept as they are without "
                "rotation and in groups of 32 (--no-rotate --group-size 32 --int4-share 0)",
                self.name,
            )
        # Rotation moves the last norm's weight into the output projection, which is then no longer the embedding.
        tied = config.tied_embeddings and not rotate
        if recipe.method == "rtn":
            sensitivity, k4 = self._weigh(Identity(), table, head)
            layers, errors = [self._nearest(i) for i in range(config.num_layers)], {}
            tensors: dict[str, torch.Tensor] = {}
        else:
            statistics = self._watch(table, rotate)
            # Without rotation a source whose weights are 4-bit codes in groups of 32 keeps them, if these groups stay together.
            granule = 1 if rotate or recipe.group_size == 128 else recipe.group_size
            transform = Transform(config, statistics, rotate=rotate, granule=granule)
            float_head, head, table = head, transform.head(head), transform.table(table)
            sensitivity, k4 = self._weigh(transform, table, head)
            layers, errors = self._round_layers(transform, table, sensitivity, k4)
            if recipe.tune:
                head = self._tune(layers, head, k4, table, lambda window: float_head.logits(statistics.final[window]))
            tensors = self._teach(layers, k4, table)
        down_hadamard = layers[0].down_hadamard
        tensors |= table_tensors("token_embd", table) | {"output_norm.weight": head.norm}
        if not tied:
            tensors |= table_tensors("output", head.weight)
        for i, layer in enumerate(layers):
            tensors |= _layer_tensors(i, layer)
        write_tensors(folder, tensors)
        write_tokenizer(folder, self.tokenizer)
        settings = self._settings(sensitivity.inputs, k4) | {"down_hadamard": down_hadamard}
        said = {"tie_word_embeddings": tied, "quantization_config": settings}
        write_json(folder / "config.json", self.values | said)
        facts = {
            "model": self.name, "method": recipe.method, "groups of weights": recipe.group_size,
            "rotated": "yes" if rotate else "no", "calibrated on": f"{self.windows.numel()} tokens",
            "took": f"{time.perf_counter() - start_s:.0f} s",
        }  # fmt: skip
        facts |= self._facts
        write_report(folder, facts, sensitivity.inputs, k4, errors)
        return int4_share(sensitivity.inputs, k4)

    def _head(self, weight: torch.Tensor) -> Head:
        return Head(self.source.vector("output_norm.weight"), weight, self.config.rms_eps, self.config.final_soft_cap)

    def _embedded(self, table: torch.Tensor) -> torch.Tensor:
        return table[self.windows] * self.config.embedding_scale

    def _watch(self, table: torch.Tensor, rotate: bool) -> Statistics:
        self._stage("Watching activations")
        return gather_statistics(self.source, self.decoder, self._embedded(table), fold=rotate, advance=self._advance)

    def _weigh(self, transform: Transform | Identity, table: torch.Tensor, head: Head) -> tuple[Sensitivity, dict[Key, int]]:
        self._stage("Weighing blocks")
        sensitivity = measure_sensitivity(self.source, transform, self.decoder, self._embedded(table), head, self._advance)
        k4 = choose_k4(sensitivity.inputs, self.recipe.int4_share)
        share = int4_share(sensitivity.inputs, k4)
        if share < self.recipe.int4_share:
            logger.warning(
                "%s: %.1f %% of the multiply-adds is all that whole blocks of %d channels give INT4 activations; %.1f %% was wanted",
                self.name, 100 * share, BLOCK_K, 100 * self.recipe.int4_share,
            )  # fmt: skip
        return sensitivity, k4

    def _nearest(self, layer_idx: int) -> RoundedLayer:
        weights = self.source.layer(layer_idx)
        codes = {name: nearest(weight, self.recipe.group_size) for name, weight in weights.linear.items()}
        self._advance()
        return RoundedLayer(codes, weights.bias, weights.norm, weights.down_hadamard)

    def _round_layers(
        self, transform: Transform, table: torch.Tensor, sensitivity: Sensitivity, k4: dict[Key, int]
    ) -> tuple[list[RoundedLayer], dict[Key, float]]:
        self._stage("Rounding weights")
        x, layers, errors = self._embedded(table), [], {}
        for i in range(self.config.num_layers):
            weights = transform.layer(i, self.source.layer(i))
            layer, found = round_layer(i, weights, k4, sensitivity.token_weights, self.decoder, x, self.recipe.group_size)
            layers.append(layer)
            errors |= {(i, name): error for name, error in found.items()}
            self._advance()
        return layers, errors

    def _tune(
        self,
        layers: list[RoundedLayer],
        head: Head,
        k4: dict[Key, int],
        table: torch.Tensor,
        teacher: Callable[[int], torch.Tensor],
    ) -> Head:
        self._stage("Tuning scales")
        tuned = tune(layers, head, k4, self.decoder, self._embedded(table), teacher, self._advance)
        found = f"{tuned.before:.4f}, {tuned.after:.4f}"
        self._facts["divergence on held-out windows, before tuning and after, nats per token"] = found
        return tuned.head

    def _teach(self, layers: list[RoundedLayer], k4: dict[Key, int], table: torch.Tensor) -> dict[str, torch.Tensor]:
        self._stage("Teaching the cache")
        x, tensors = self._embedded(table), {}
        for i, layer in enumerate(layers):
            rounding = teach_cache(i, layer, k4, self.decoder, x)
            tensors |= key_rounding_tensors(f"blk.{i}.{STEMS['k']}", rounding)
            self._advance()
        return tensors

    def _settings(self, inputs: dict[Key, Input], k4: dict[Key, int]) -> dict[str, object]:
        return {
            "quant_method": QUANT_METHOD, "version": VERSION, "method": self.recipe.method, "bits": 4,
            "group_size": self.recipe.group_size, "int4_share": round(int4_share(inputs, k4), 4),
            "k4": [{name: k4[i, name] for name in INPUTS} for i in range(self.config.num_layers)],
        }  # fmt: skip


def _layer_tensors(layer_idx: int, layer: RoundedLayer) -> dict[str, torch.Tensor]:
    prefix = f"blk.{layer_idx}."
    tensors = {f"{prefix}{STEMS[name]}.bias": bias for name, bias in layer.bias.items()}
    tensors |= {f"{prefix}{NORMS[name]}.weight": norm for name, norm in layer.norm.items()}
    for name, codes in layer.codes.items():
        tensors |= code_tensors(prefix + STEMS[name], codes)
    return tensors


def _check_shape(path: Path, config: ModelConfig) -> None:
    for name in ("hidden_size", "qo_size", "intermediate_size"):
        if getattr(config, name) % 32:
            raise ModelLoadError(f"{path}: {name} is {getattr(config, name)}; quantised weights need multiples of 32")


def _windows(tokens: list[int], recipe: Recipe) -> torch.Tensor:
    """[num_windows, window_tokens], spread evenly over the text."""
    length, count = recipe.window_tokens, recipe.num_windows
    if len(tokens) < length * count:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens; {count} windows of {length} need {length * count} (--calib-windows)"
        )
    stride = len(tokens) // count
    return torch.tensor([tokens[i * stride : i * stride + length] for i in range(count)])
