"""The rules of the house (CONTRIBUTING.md): what may stand where, how long a file may be, and that names resolve."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tilestream import ops
from tilestream.ops import _fakes

ROOT = Path(__file__).parents[2]
SOURCE_SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".py"}
LEVELS = ("portable", "avx2", "avx512", "avx512_vnni")


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SOURCE_SUFFIXES]


def matches(pattern: str, paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return found


def test_assembly_stands_in_the_ptx_folder() -> None:
    """Plus the `yield` of threads that wait, for which arm64 has no builtin, and empty optimiser barriers in simd/."""
    others = [path for path in sources("csrc") if "csrc/cuda/ptx" not in path.as_posix()]
    found = matches(r"\b(asm|__asm__|__asm)\b\s*(volatile|__volatile__)?\s*\(", others)
    barriers = [line for line in found if line.startswith("csrc/cpu/simd/") and re.search(r'asm\s*(volatile)?\s*\(""', line)]
    pauses = [line for line in found if re.match(r'csrc/cpu/common/pause\.h:\d+: asm volatile\("yield"\);', line)]
    assert [line for line in found if line not in barriers + pauses[:1]] == []


def wrappers(path: Path) -> set[str]:
    """Names of the functions that a header of the PTX layer, or its twin, gives to kernels."""
    text = path.read_text()
    functions = re.findall(r"^(?:__device__ __forceinline__|SIMT_TWIN|inline)\b[^;{]*?(\w+)\(", text, re.MULTILINE)
    return set(functions) | set(re.findall(r"^(?:TILESTREAM|SIMT)_W?G?MMA\((\w+),", text, re.MULTILINE))


@pytest.mark.parametrize("path", sorted((ROOT / "csrc/cuda/ptx").glob("*.cuh")), ids=lambda path: path.stem)
def test_every_ptx_wrapper_has_its_twin(path: Path) -> None:
    twin = ROOT / "tests/simt/include/cuda/ptx" / path.name
    assert twin.exists() or "asm" not in path.read_text()
    if twin.exists():
        assert wrappers(path) - {"pin"} <= wrappers(twin)
        assert wrappers(path) - {"pin"}


def test_torch_stands_in_api_and_bindings() -> None:
    others = [path for path in sources("csrc") if path.parent.name != "api" and path.name != "bindings.cpp"]
    assert matches(r'#include\s*[<"](torch|ATen|c10)/', others) == []
    assert matches(r"torch/(extension|all)\.h", sources("csrc")) == []


def test_intrinsics_stand_in_simd() -> None:
    others = [path for path in sources("csrc") if "csrc/cpu/simd" not in path.as_posix()]
    assert matches(r"\b_mm(256|512)?_\w+\(|\b__m(128|256|512)[di]?\b|immintrin\.h|arm_neon\.h", others) == []


def test_headers_shared_by_backends_are_plain() -> None:
    assert matches(r"cuda_runtime|immintrin|pybind11|Python\.h", sources("csrc/include")) == []


def test_files_can_be_read_in_one_sitting() -> None:
    too_long = []
    for path in sources("csrc", "python", "tests", "bench"):
        ceiling = 300 if path.suffix == ".py" and path.parts[len(ROOT.parts)] != "tests" else 500
        num_lines = len(path.read_text().splitlines())
        if num_lines > ceiling:
            too_long.append(f"{path.relative_to(ROOT)}: {num_lines} lines, ceiling {ceiling}")
    assert too_long == []


# op -> (CPU kernel, reference, test), where one file holds several ops.
STEMS = {
    "attention": ("attention", "attention", "attention"),
    "merge_states": ("merge_states", "merge_states", "merge_states"),
    "append_kv": ("append_kv", "append_kv", "append_kv"),
    "gather_kv": ("gather_kv", "append_kv", "append_kv"),
    "quantise": ("quantise", "linear", "quantise"),
    "hadamard": ("quantise", "linear", "quantise"),
    "linear": ("linear", "linear", "linear"),
    "linear_quant": ("linear", "linear", "quantise"),
    "pack_weight": ("pack_weight", "linear", "linear"),
    "pack_gguf": ("pack_weight", None, "pack_gguf"),  # the reference is the gguf package
    "embedding": ("embedding", "linear", "linear"),
    "rms_norm": ("norm", "norm", "norm"),
    "rms_norm_quant": ("norm", "norm", "quantise"),
    "fused_add_rms_norm": ("norm", "norm", "norm"),
    "fused_add_rms_norm_quant": ("norm", "norm", "quantise"),
    "silu_and_mul": ("activation", "activation", "activation"),
    "silu_and_mul_quant": ("activation", "activation", "quantise"),
    "gelu_tanh_and_mul": ("activation", "activation", "activation"),
    "gelu_tanh_and_mul_quant": ("activation", "activation", "quantise"),
    "sample": ("sample", "sample", "sample"),
    "shard_histogram": ("shard_draw", "shard_draw", "shard_draw"),
    "shard_masses": ("shard_draw", "shard_draw", "shard_draw"),
    "shard_draw": ("shard_draw", "shard_draw", "shard_draw"),
    "allreduce_rmsnorm": ("allreduce", "norm", "allreduce"),
}


def test_every_op_has_all_its_files() -> None:
    registered = set(re.findall(r'm\.def\(\s*"(\w+)\(', "".join(p.read_text() for p in sources("csrc/api"))))
    assert registered == set(STEMS) == set(_fakes.OPS)
    for kernel, reference, test in STEMS.values():
        assert (ROOT / f"csrc/cpu/{kernel}.cpp").exists()
        assert reference is None or (ROOT / f"python/tilestream/reference/{reference}.py").exists()
        assert (ROOT / f"tests/ops/test_{test}.py").exists()


def test_references_share_no_code_with_kernels() -> None:
    assert matches(r"import.*\b(ops|_native|_C|testing)\b|torch\.ops\.", sources("python/tilestream/reference")) == []


def documents() -> list[Path]:
    """Every page of documentation that names paths."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    pages += [path for folder in ("csrc", "python", "tests", "bench") for path in sorted((ROOT / folder).rglob("README.md"))]
    return [page for page in pages if page.exists()]


@pytest.mark.parametrize("page", documents(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_paths_in_documents_resolve(page: Path) -> None:
    """Paths in code spans and links, from the root or from the page's folder; placeholders like <op> stand for any name."""
    text = page.read_text()
    spans = re.findall(r"`([\w./<>*-]+/[\w./<>*-]*)`", text)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = []
    for name in spans + [link for link in links if link]:
        first = re.split(r"[/<*]", name)[0]
        known_folder = (ROOT / first).exists() or (page.parent / first).exists()
        if name.startswith("/") or (name in spans and not known_folder):
            continue  # an URL path, a dtype/shape, somebody else's file
        pattern = re.sub(r"<\w+>", "*", name).rstrip("/")
        if not any(list(base.glob(pattern)) for base in (ROOT, page.parent)):
            missing.append(name)
    assert missing == []


def level_objects() -> dict[str, list[Path]]:
    """The object files of each SIMD level in the newest build folder."""
    folders = sorted((ROOT / "build").glob("*/CMakeFiles/cpu_portable.dir"), key=lambda path: path.stat().st_mtime)
    if not folders:
        return {}
    return {level: sorted((folders[-1].parent / f"cpu_{level}.dir").rglob("*.o")) for level in LEVELS}


def test_level_objects_share_no_symbol() -> None:
    """A weak symbol outside its level's namespace could be merged by the linker with another level's instructions."""
    objects = level_objects()
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs a build folder and nm")
    leaks = []
    for level, paths in objects.items():
        for path in paths:
            listing = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
            for line in listing.splitlines():
                _, kind, name = line.split(maxsplit=2)
                if kind in "WVuTBDR" and f"tilestream::cpu::{level}::" not in name:
                    leaks.append(f"{level} {path.name}: {kind} {name}")
    assert leaks == []


def public_functions() -> list:
    functions = []
    for name in ops.__all__:
        value = getattr(ops, name)
        if inspect.isfunction(value):
            functions.append(value)
        else:
            functions += [f for n, f in inspect.getmembers(value, inspect.isfunction) if not n.startswith("_")
                          and f.__module__.startswith("tilestream") and f.__name__ != "<lambda>"]
    return functions


@pytest.mark.parametrize("function", public_functions(), ids=lambda f: f.__qualname__)
def test_public_ops_are_documented(function) -> None:
    assert function.__doc__, "no docstring"
    if "." in function.__qualname__ and function.__qualname__.split(".")[1] in ("empty",):
        return  # a constructor of one line
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in function.__doc__ or f"{section[:-1]}: " in function.__doc__, f"no {section} section"
    for parameter in inspect.signature(function).parameters:
        assert parameter == "self" or re.search(rf"\b{parameter}\b", function.__doc__), f"{parameter} is not described"


def test_every_op_is_mentioned_once_as_fake() -> None:
    assert len(set(_fakes.OPS)) == len(_fakes.OPS)
