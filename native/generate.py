"""Writes what libdnp takes from Python as data, into ``src/generated/``: run it after a change of any of its sources.

``python native/generate.py`` needs the package with its development extra. A test compares what it gives with what is
committed.

- ``constants.hpp``: the columns of a sampler table, limits, the schema of bundles.
- ``samplers.inc``: JSON of the samplers, of what every class of diffusers' schedulers honours, of quadrature nodes.
- ``unicode.inc``: what the ``tokenizers`` library takes characters for, asked of it character by character. Python's
  own ``unicodedata`` is of another version of Unicode.
- ``tests/golden.json``: questions to ``dnp-probe`` with Python's answers.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from dnp.engine.backends.onnxruntime import cuda_plans
from dnp.engine.bundle import columns, contract, manifest
from dnp.engine.bundle.bundle import Bundle
from dnp.engine.plans import compiler
from dnp.engine.system import cuda
from dnp.runtime import job, request, tokenizer
from dnp.runtime.captioning import captioner, resize
from dnp.runtime.sampling import grids, samplers, schedule, settings
from dnp.runtime.sampling.noise import TorchNoise

HERE = Path(__file__).parent
NOTE = "// Written by native/generate.py; do not edit.\n"
SURROGATES = range(0xD800, 0xE000)
CODE_POINTS = [chr(point) for point in range(0x110000) if point not in SURROGATES]
Ranges = list[tuple[int, int]]


def constants() -> str:
    """``constants.hpp``."""
    parts = {name.lower(): value for name, value in vars(columns).items() if name.isupper()}
    lines = [NOTE + "#pragma once\n", "#include <cstdint>\n", "namespace dnp::core {\n"]
    lines.append("// The columns of a sampler table: see dnp/engine/bundle/columns.py.\nnamespace column {")
    for name, value in parts.items():
        start = value.start if isinstance(value, slice) else value
        lines.append(f"constexpr std::int64_t {'count' if name == 'row' else name} = {start};")
    lines.append("}  // namespace column\n")
    limits = {
        "schema_version": manifest.SCHEMA,
        "batch": contract.BATCH,
        "max_images": request.MAX_IMAGES,
        "max_windows": job.MAX_WINDOWS,
        "max_beams": captioner.MAX_BEAMS,
        "max_characters": tokenizer.MAX_CHARACTERS,
        "max_side": resize.MAX_SIDE,
        "usual_steps": contract.STEPS,
        "beams_at_most": contract.BEAMS,
        "cuda_revision": cuda_plans.REVISION,
        "tensorrt_revision": compiler.REVISION,
        "oldest_gpu": cuda.OLDEST,
    }
    lines += [f"constexpr std::int64_t {name} = {value};" for name, value in limits.items()]
    lines.append("\n}  // namespace dnp::core\n")
    return "\n".join(lines)


def sampler_data() -> str:
    """``samplers.inc``: one raw string."""
    data = {
        "samplers": {name: _sampler(spec) for name, spec in grids.SAMPLERS.items()},
        "flow_samplers": {name: _sampler(spec) for name, spec in grids.FLOW_SAMPLERS.items()},
        "schedulers": {name: _keys(keys) for name, keys in settings.SCHEDULERS.items()},
        "flow_schedulers": {name: _keys(keys) for name, keys in settings.FLOW_SCHEDULERS.items()},
        "conversions": [list(pair) for pair in settings.CONVERSIONS.items()],
        "beta_schedules": schedule.BETA_SCHEDULES,
        "prediction_types": schedule.PREDICTION_TYPES,
        "spacings": schedule.SPACINGS,
        "methods": {
            name: {"column": method.column, "most": None if method.most == samplers.FLOAT32_MAX else method.most}
            for name, method in samplers.METHODS.items()
        },
        "gauss": {count: [part.tolist() for part in np.polynomial.legendre.leggauss(count)] for count in (2, 32)},
    }
    return f'{NOTE}R"json({json.dumps(data, indent=1, allow_nan=False)})json"\n'


def _sampler(spec: Any) -> dict[str, Any]:
    return {**spec._asdict(), "run": spec.run.__name__, "fixed": dict(spec.fixed)}


def _keys(keys: settings.Keys) -> dict[str, Any]:
    """The keys that change numbers; what changes nothing is left out."""
    return {
        key: {
            "default": _finite(setting.default),
            "values": _values(setting.values),
            "reason": setting.reason,
            "instead": dict(setting.instead),
        }
        for key, setting in keys.items()
        if isinstance(setting, settings.Setting)
    }


def _values(values: Any) -> dict[str, Any]:
    if isinstance(values, tuple):
        return {"among": list(dict.fromkeys(map(_finite, values)))}
    if isinstance(values, settings._OrNone):
        return {**_values(values.values), "or_null": True}
    if isinstance(values, settings._Steps):
        return {"steps": True}
    high = None if values.high == math.inf else values.high
    return {"whole": values.kind is int, "low": values.low, "high": high}


def _finite(value: Any) -> Any:
    return None if value == -math.inf else value  # JSON has no infinity; null says the same to the one key concerned


def unicode_data() -> str:
    """``unicode.inc``."""
    lower = _each(normalizers.Lowercase())
    decomposed = _each(normalizers.NFD())
    composed = _each(normalizers.NFC())
    decompositions = {c: d for c, d in decomposed.items() if c != d and not _is_hangul(c)}
    compositions = {d: c for c, d in decompositions.items() if composed[c] == c}
    parts = {
        "letters": _matching(r"\p{L}"),
        "numbers": _matching(r"\p{N}"),
        "spaces": _matching(r"\s"),
        "bert_spaces": _bert_split(2),
        "bert_punctuation": _bert_split(3),
    }
    cleaned = _each(
        normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False)
    )
    parts["bert_removed"] = _ranges(c for c, to in cleaned.items() if to == "" and c != "\0")
    parts["bert_blanks"] = _ranges(c for c, to in cleaned.items() if to == " " and c != " ")
    chinese = _each(
        normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False)
    )
    parts["bert_chinese"] = _ranges(c for c, to in chinese.items() if to == f" {c} ")
    stripped = _each(
        normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False)
    )
    parts["nonspacing_marks"] = _ranges(c for c, to in stripped.items() if to == "" and decomposed[c] == c)
    lines = [NOTE]
    for name, ranges in parts.items():
        lines.append(f"constexpr Range {name}[] = {{\n{_rows(f'{{{a:#x}, {b:#x}}}' for a, b in ranges)}}};\n")
    lowered = {c: to for c, to in lower.items() if c != to}
    classes = _combining_classes(decompositions)
    lines.append(f"constexpr Mapping lower_case[] = {{\n{_rows(_mapping(lowered))}}};\n")
    lines.append(f"constexpr Mapping canonical[] = {{\n{_rows(_mapping(decompositions))}}};\n")
    pairs = sorted((_prefix(d[:-1], compositions), d[-1], c) for d, c in compositions.items())
    lines.append(
        f"constexpr Composition composition[] = {{\n"
        f"{_rows(f'{{{ord(a):#x}, {ord(b):#x}, {ord(c):#x}}}' for a, b, c in pairs)}}};\n"
    )
    runs = [(kind, [c for c, _ in group]) for kind, group in groupby(sorted(classes.items()), key=lambda item: item[1])]
    rows = [f"{{{a:#x}, {b:#x}, {kind}}}" for kind, members in runs for a, b in _ranges(members)]
    lines.append(f"constexpr Class combining[] = {{\n{_rows(rows)}}};\n")
    return "\n".join(lines)


def _prefix(text: str, compositions: Mapping[str, str]) -> str:
    """The one character that the first part of a decomposition composes to."""
    return text if len(text) == 1 else compositions[text]


def _is_hangul(character: str) -> bool:
    return "\uac00" <= character <= "\ud7a3"  # by arithmetic, not by table


def _each(normalizer: Any) -> dict[str, str]:
    """What a normalizer makes of each code point alone."""
    return {c: normalizer.normalize_str(c) for c in CODE_POINTS}


def _matching(pattern: str) -> Ranges:
    """The code points that a pattern of ``tokenizers`` matches."""
    text = "".join(CODE_POINTS)
    found = pre_tokenizers.Split(Regex(pattern), "removed", invert=True).pre_tokenize_str(text)
    return _ranges(c for piece, _ in found for c in piece)


def _bert_split(pieces: int) -> Ranges:
    """The code points that break a word in two (spaces), or stand between as a third (punctuation)."""
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    return _ranges(c for c in CODE_POINTS if len(split(f"a{c}a")) == pieces)


def _combining_classes(decompositions: Mapping[str, str]) -> dict[str, int]:
    """The combining class of each mark, from the order that marks are put in."""
    order = normalizers.NFD().normalize_str
    first, last = "\u0334", "\u0345"  # of the smallest class and the largest

    def before(a: str, b: str) -> bool:  # whether a has the smaller class, neither being 0
        return order(f"A{b}{a}") == f"A{a}{b}" and a != b

    # The library may know an older Unicode, in which some marks have no class yet.
    marks = [
        c
        for c in CODE_POINTS
        if c not in decompositions and not _is_hangul(c) and (before(c, last) or before(first, c))
    ]
    known = {unicodedata.combining(c): c for c in reversed(marks)}
    kinds = sorted(known)
    classes = {}
    for c in marks:
        place = next(i for i, kind in enumerate(kinds) if not before(known[kind], c))
        assert not before(c, known[kinds[place]]), c
        classes[c] = kinds[place]
    return classes


def _ranges(characters: Iterable[str]) -> Ranges:
    ranges: Ranges = []
    for point in sorted(map(ord, characters)):
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1] = (ranges[-1][0], point)
        else:
            ranges.append((point, point))
    return ranges


def _mapping(texts: Mapping[str, str]) -> list[str]:
    return [f"{{{ord(c):#x}, {{{', '.join(f'{ord(t):#x}' for t in to)}}}}}" for c, to in sorted(texts.items())]


def _rows(items: Iterable[str]) -> str:
    lines, line = [], "   "
    for item in items:
        if len(line) + len(item) > 118:
            lines.append(line)
            line = "   "
        line += f" {item},"
    return "\n".join([*lines, line, ""])


def golden() -> str:
    """``tests/golden.json``: questions to ``dnp-probe``, each with Python's answer."""
    bundle = Bundle.default()
    config = bundle.schedule
    texts = [
        "",
        "a photo of an Astronaut",
        "it's 2nd, cafe\u0301 İ ﬁ",
        "画像 <|endoftext|> <|StartOfText|>",
        "🙂 a\u0327\u0301\x1c\xa0b",
    ]
    questions: list[dict[str, Any]] = []
    for seed in (0, 7, 2**32 + 7):
        generator, counts = TorchNoise(seed), [64, 3, 17, 5]
        questions.append(
            {"ask": "noise", "seed": seed, "counts": counts, "value": [bits(generator.randn((n,))) for n in counts]}
        )
    for sampler in samplers.sampler_names():
        table = samplers.sampler_table(schedule.read_schedule(config), sampler, 4, [1.5] * 4)
        asked = {"schedule": config, "size": [16, 16], "sampler": sampler, "steps": 4, "guidance": [1.5] * 4}
        value = {"rows": bits(table.rows), "roles": table.roles, "noise_steps": len(table.noise_steps)}
        questions.append({"ask": "table", **asked, "value": value})
    for name in ("prompt", "caption"):
        file = f"../../dnp/default/tokenizers/{name}.json"
        reader = Tokenizer.from_file(str(bundle.path / "tokenizers" / f"{name}.json"))
        ids = [encoding.ids for encoding in reader.encode_batch(texts, add_special_tokens=False)]
        questions.append({"ask": "encode", "file": file, "texts": texts, "value": ids})
    ids = [[130, 5, 17, 40, 3], [41, 42, 999, 2], []]
    questions.append(
        {
            "ask": "decode",
            "file": file,
            "ids": ids,
            "value": [reader.decode(row, skip_special_tokens=True) for row in ids],
        }
    )
    for source in (16, 17, 40):
        questions.append(
            {
                "ask": "resize",
                "source": source,
                "target": 16,
                "value": bits(resize.resize_matrices(source, source, 16)[1]),
            }
        )
    return "[\n" + ",\n".join(json.dumps(question, ensure_ascii=False) for question in questions) + "\n]\n"


def bits(values: Any) -> str:
    """Float32 numbers as the hexadecimal digits of their bits."""
    return np.asarray(values, ">f4").tobytes().hex()


FILES: Mapping[str, Callable[[], str]] = {
    "tests/golden.json": golden,
    "src/generated/constants.hpp": constants,
    "src/generated/samplers.inc": sampler_data,
    "src/generated/unicode.inc": unicode_data,
}

if __name__ == "__main__":
    for file, contents in FILES.items():
        (HERE / file).write_text(contents(), encoding="utf-8")
