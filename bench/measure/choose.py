"""From the words of a command line to cases: rules with options, features, parameter lists, methods."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..models import architectures, shapes
from ..models.shapes import ParamList, list_of
from ..models.traffic import DTYPES, Storage
from .baselines import METHODS, RIVALS, composed, own
from .case import Case
from .clocks import ANCHORS
from .method import EXTRAS, SUBJECTS, Extras, Method, Subject, reference_options
from .rivals import COMPRESSED

AGAINST = {  # what a user calls the methods that ours is compared with
    "fused": "torch_fused",
    "foreach": "torch_foreach",
    "for-loop": "torch_forloop",
    "compile": "torch_compiled",
    **{name: name for name in RIVALS},
}
MODELS = {
    "gpt2": "gpt2-124m",
    "llama3-8b-layer": "llama3-8b-layer-x1",
    "small1000": "small-1000",
}
# Options of ours that are features here, for the others have them composed; what they are set to by `--with`.
DEFAULTS = {
    "max_grad_norm": EXTRAS["clip"].clip,
    "noise": EXTRAS["noise"].noise,
    "centralize": True,
    "ema_decay": EXTRAS["ema"].ema,
}
FEATURES = {"clip": "max_grad_norm", "noise": "noise", "centralize": "centralize", "ema": "ema_decay"}
WORDS = {"clip": "clip", "noise": "noise", "centralize": "GC", "ema": "EMA"}


def key_of(extras: Extras) -> str:
    """A name as `clip+centralize`, with the value where it is not the usual."""
    return "+".join(
        name if value == DEFAULTS[FEATURES[name]] else f"{name}={value:g}"
        for name, value in extras.values.items()
    )


def title_of(extras: Extras, gc: str) -> str:
    """What tables call them; `gc`: what they call centring."""
    return ", ".join(gc if name == "centralize" else WORDS[name] for name in extras.values)


def options_from(words: Iterable[str]) -> dict[str, Any]:
    """`lr=1e-3 betas=0.9,0.95 backend=eager` as values: Python's literals, or else text."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name.isidentifier() and equals and text):
            raise ValueError(f"--set {word}: expected name=value, for example --set lr=1e-3 momentum=0.9")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            if not text.isidentifier():
                raise ValueError(f"--set {word}: {text!r} is no value of Python; {error}") from error
            found[name] = text
    return found


def features_from(names: Iterable[str], options: dict[str, Any]) -> Extras:
    """The features that are named, or set as options, which are taken out of `options`."""
    given = {}
    for name in names:
        if name not in FEATURES:
            raise ValueError(f"--with {name}: there are {', '.join(FEATURES)}, and several as clip,ema")
        given[FEATURES[name]] = DEFAULTS[FEATURES[name]]
    given |= {name: options.pop(name) for name in DEFAULTS if name in options}
    if not isinstance(given.get("centralize", False), bool):
        raise ValueError("--set centralize: only True and False are compared here")
    for name, value in given.items():
        number = isinstance(value, float | int) and value > 0 and (name != "ema_decay" or value < 1)
        if name != "centralize" and value is not None and (isinstance(value, bool) or not number):
            limits = "between 0 and 1" if name == "ema_decay" else "above 0"
            what = " (the variance at the first step)" if name == "noise" else ""
            raise ValueError(f"--set {name}={value}: expected a number {limits}{what}")
    clip, noise, ema = (given.get(name) for name in ("max_grad_norm", "noise", "ema_decay"))
    return Extras(clip, noise, ema, given.get("centralize") is True)


def subjects_from(names: Sequence[str], options: dict[str, Any]) -> list[Subject]:
    """The rules that are named; each is given those of the options that it has."""
    made = [_subject(name, options) for name in names]
    known = {name for subject in made for name in (*subject.options, *subject.own)}
    if unknown := [name for name in options if name not in known]:
        classes = ", ".join(dict.fromkeys(subject.cls for subject in made))
        raise ValueError(f"--set {unknown[0]}: no option of {classes}; docs/ has a page of each")
    return made


def _subject(name: str, options: dict[str, Any]) -> Subject:
    import torch

    import fusedcalib
    from fusedcalib.registry import options_of

    classes = fusedcalib.optimizers()
    title = next((title for title in SUBJECTS if title.lower() == name.lower()), None)
    if title is None:
        more = ", ".join(repr(title) for title in SUBJECTS if title not in classes)
        raise ValueError(f"--optimizer {name}: there are {', '.join(classes)}; with options {more}")
    start = SUBJECTS[title]
    of_rule = {k: v for k, v in options.items() if k in reference_options(start.cls)}
    own = {k: v for k, v in options.items() if k in options_of(classes[start.cls]) and k not in of_rule}
    said = ", ".join(f"{k}={v}" for k, v in (of_rule | own).items())
    made = Subject(start.cls, start.options | of_rule, own, f"{title} {said}".strip())
    try:
        classes[made.cls]([torch.zeros(1, requires_grad=True)], **made.options, **own)
    except Exception as error:
        raise ValueError(f"--optimizer {name} with {said}: {error}") from error
    return made


def lists_from(models: Sequence[str], files: Sequence[Path], configs: Sequence[Path]) -> list[ParamList]:
    """Parameter lists by name, from files of shapes, and from config.json of models."""
    made = [architectures.from_shapes(path) for path in files]
    made += [architectures.from_config(path) for path in configs]
    return [_list(name) for name in models] + [list_of(model.name, model.params) for model in made]


def _list(name: str) -> ParamList:
    if name in architectures.LLAMAS:
        return list_of(name, architectures.get(name).params)
    try:
        return shapes.get(MODELS.get(name, name))
    except KeyError:
        known = ", ".join((*MODELS, *shapes.LISTS, "single-2^20", *architectures.LLAMAS))
        raise ValueError(f"--model {name}: there are {known}; others: --shapes or --hf-config") from None


def methods_for(
    extras: Extras, against: Sequence[str], storage: Storage = DTYPES["fp32"]
) -> tuple[Method, ...]:
    """Ours and the others. With features all have those; torch's fused step and ours are also without."""
    if unknown := [name for name in against if name not in AGAINST]:
        raise ValueError(f"--against {unknown[0]}: there are {', '.join(AGAINST)}")
    others = _others(against, storage)
    ours = METHODS["own_plain"]
    if not extras.values:
        return (ours, *([FP32_STEP] if storage.packed else []), *others)
    key, title = key_of(extras), f"{ours.title} with {title_of(extras, 'GC')}"
    with_all = Method(f"own_{key}", title, own(extras), extras, reference=True)
    around = [
        replace(
            method,
            name=f"eager_{key}_{method.name}",
            title=f"{title_of(extras, 'eager GC')} + {method.title}",
            make=composed(extras, method.make),
            extras=extras,
            like=composed(extras),
        )
        for method in others
    ]
    return (METHODS["torch_fused"], ours, with_all, *around)


FP32_STEP = Method("own_fp32", "fusedcalib, all fp32", own(), reference=True, kept=DTYPES["fp32"])


def _others(against: Sequence[str], storage: Storage) -> list[Method]:
    """The methods beside ours; where we keep less than a dtype, libraries that do so too."""
    methods = [METHODS[AGAINST[name]] for name in against]
    if not storage.packed:
        return methods
    plain = next(name for name, one in DTYPES.items() if one == storage.plain)
    found = [
        replace(method, title=f"{method.title}, all {plain}")
        for method in methods
        if method.name not in RIVALS
    ]
    for name in (name for name in against if storage.coded and name in COMPRESSED):
        one = COMPRESSED[name].beside(storage)
        kept, rival = one.kept(storage), one.rival
        made = Method(f"{name}_8bit", rival.title, rival.make, narrow=rival.narrow, kept=kept, form=one.form)
        found.append(made)
    return found


def cases_from(
    subjects: Sequence[Subject],
    lists: Sequence[ParamList],
    dtypes: Sequence[str],
    extras: Extras,
    against: Sequence[str],
) -> list[Case]:
    """Every rule on every list in every dtype."""
    key = key_of(extras)
    with_all = (*(f"eager_{key}_{name}" for name in ANCHORS[:2]), f"own_{key}") if key else ()
    bases = (*with_all, *ANCHORS)
    return [
        Case(spec, methods_for(extras, against, DTYPES[dtype]), dtype, subject, key, bases)
        for spec in lists
        for dtype in dtypes
        for subject in subjects
    ]


def needed_bytes(case: Case) -> int:
    """Memory that the methods of a case hold at one time: each has its own parameters, gradients, states."""
    assert not isinstance(case.list, str)
    assert not isinstance(case.subject, str)
    storage, states = DTYPES[case.dtypes], case.subject.states()
    each = (m.storage(storage).kept(states, m.extras.ema is not None) for m in case.rows().values())
    return round(case.list.params * sum(each))
