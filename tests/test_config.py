"""A configuration survives JSON; every mistake in one is named, with its path, at once."""

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekd.config import BuildConfig, load_config
from edgekd.core import config_file, plugins, serialization
from edgekd.core.renamed import RENAMED, new_name
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError
from edgekd.stages.bench.config import Scope
from edgekd.stages.bench.gates import OTHER


def digits():
    return config_file.read_config("digits")


@pytest.mark.parametrize("name", config_file.recipes())
def test_every_recipe_is_valid_and_survives_json(name):
    made = serialization.from_json(BuildConfig, config_file.read_config(name))
    assert serialization.from_json(BuildConfig, json.loads(json.dumps(serialization.to_json(made)))) == made


def test_what_the_docs_show_is_valid(tmp_path):
    docs = Path(__file__).parents[1] / "docs"
    pages = (docs / "own-network-and-images.md", docs / "howto" / "ci-gates.md")
    whole, gates = (re.search(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)[1] for page in pages)
    (tmp_path / "shown.yaml").write_text(whole + gates)
    made = load_config(str(tmp_path / "shown.yaml"), (), ("cpu", "jetson"), small=False)
    assert made.name == "photos" and len(made.gates) == 3
    routes = "student.method={use: kpn, routes: [{teacher: layer3.5.join, student: layer3.1.join}]}"
    (route,) = load_config(str(tmp_path / "shown.yaml"), (routes,), (), small=False).student.method.routes
    for name, model in ((route.teacher, made.teacher.model), (route.student, made.student.model)):
        assert name in dict(model.build(2, 3).named_modules())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("student.method.kd_wieght=1.0", "student.method has no `kd_wieght`"),
        ("student.method.kd_wieght=1.0", "did you mean `kd_weight`?"),
        ("student.method={use: curriculum}", "student.method.base is missing\n\nhint: write `base: {use: NAME}`"),
        (
            "student.baselines=[{use: assistant, base: {use: kd}}]",
            "write `assistants: [{use: NAME}]`; `edgekd list models`",
        ),
        ("student.method.kd_weight=big", 'student.method.kd_weight is "big": Input should be a valid number'),
        ("student.method.use=kpm", "did you mean `kpn`?"),
        ("student.epochs=2.5", "student.epochs is 2.5: Input should be a valid integer"),
        ("teacher.model.depth=21", "teacher.model: depth is 21, which no ResNet of the CIFAR family has"),
        ("data.use=digit", "did you mean `digits`?"),
        ("data=digits", "data names no plug-in"),
        ("studnet.epochs=3", "the configuration has no `studnet`"),
        ("student.method.kd_weight=2", "use a fraction between 0 and 1"),
        ("student.train.lr=-1", "use a number above 0"),
        ("name.x=1", "`name` holds no keys"),
        ("student.epochs", "names no value"),
        ("student.epochs=[", "is not YAML"),
    ],
)
def test_names_the_mistake(change, says):
    with pytest.raises(ConfigError) as error:
        load_config("digits", (change,), (), False)
    assert says in str(error.value)


def test_reports_every_mistake_at_once():
    changes = ("student.method.wieght=1", "teacher.epochs=x", "data.size=4")
    with pytest.raises(ConfigError) as error:
        load_config("digits", changes, (), False)
    assert all(part in str(error.value) for part in ("wieght", "teacher.epochs", "data.size"))


def test_a_missing_key_is_named():
    data = digits()
    del data["teacher"]["model"]
    with pytest.raises(ConfigError, match="teacher.model is missing"):
        serialization.from_json(BuildConfig, data)


def test_scientific_notation_is_a_number():
    assert load_config("digits", ("student.train.lr=1e-3",), (), False).student.train.lr == 0.001


def test_a_key_that_is_there_twice_is_a_mistake(tmp_path):
    (tmp_path / "c.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match="`name` is there twice"):
        config_file.read_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("source", "says"), [("digit", "did you mean `digits`?"), ("none.yaml", "there is no file `none.yaml`")]
)
def test_a_missing_recipe_names_the_near_one(source, says):
    with pytest.raises(ConfigError) as error:
        config_file.read_config(source)
    assert says in str(error.value)


def test_a_target_is_chosen_by_name_and_keeps_its_settings():
    made = load_config("digits", ("targets=[{use: cpu, threads: 2}]",), ("cpu",), False)
    assert [t.threads for t in made.targets] == [2]
    with pytest.raises(ConfigError, match="did you mean `cpu`"):
        load_config("digits", (), ("cpuu",), False)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ("student.epochs=2.5", "write a whole number"),
        ("student.epochs=many", "write a whole number"),
        ("student.train.lr=fast", "write a number, such as 0.1"),
        ("name=3", "write a text, in quotes"),
        ("quantize.method=best", "choose one of these values"),
        ("bench.metrics=top1", "write a list"),
        ("calibration=3", "write keys with values below it"),
        ("data=digits", "`edgekd list` says"),
    ],
)
def test_every_mistake_comes_with_the_fix(change, hint):
    with pytest.raises(ConfigError) as error:
        load_config("digits", (change,), (), False)
    assert hint in error.value.hint


def test_a_date_stays_a_text():
    assert load_config("digits", ("name=2026-01-31",), (), False).name == "2026-01-31"
    assert config_file.parse_yaml("2001-12-14 21:59:43", "here") == "2001-12-14 21:59:43"


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes("name: grün".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not a text in UTF-8: byte 8 is 0xfc"):
        config_file.read_config(str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_bytes("name: grün".encode())
    assert config_file.read_config(str(tmp_path / "c.yaml")) == {"name": "grün"}


def settings_of(kind: type) -> Iterator[type]:
    """The classes of all settings of a build, plug-ins included."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        for inner in (hint, *typing.get_args(hint)):
            if isinstance(inner, type) and issubclass(inner, Settings):
                if "FOLDER" in vars(inner):
                    yield from (plugins.load(inner.FOLDER, name) for name in plugins.names(inner.FOLDER))
                else:
                    yield from settings_of(inner)


KINDS = [kind for kind in dict.fromkeys(settings_of(BuildConfig)) if dataclasses.is_dataclass(kind)]
FIELDS = {kind: {field.name for field in dataclasses.fields(kind)} for kind in KINDS}
NAMES = {*plugins.names("methods"), *plugins.names("metrics"), *OTHER, *typing.get_args(Scope)}


@pytest.mark.parametrize("old", RENAMED)
def test_a_former_name_is_refused_with_the_new_one(old):
    unused = set(RENAMED[old]) - NAMES - set().union(*FIELDS.values())
    assert not unused, "a new name that is none"
    for kind, fields in FIELDS.items():
        if old not in fields and (new := new_name(old, fields)):
            with pytest.raises(ConfigError, match=f"it is called `{new}` now"):
                serialization.from_json(kind, {old: 1})
    if new := new_name(old, NAMES):
        assert f"it is called `{new}` now" in plugins.unknown_name("no such name", old, sorted(NAMES)).hint


@pytest.mark.parametrize(
    ("change", "new"),
    [
        ("calib={images: 16}", "calibration"),
        ("student.method.use=alone", "supervised"),
        ("student.method.reentry=0.1", "stage1_replay"),
        ("bench.blocks=9", "rounds"),
        ("bench.scopes=[copies]", "end_to_end"),
        ("bundle.checked=8", "verify_images"),
        ("gates=[{measure: top1, at_least: 90}]", "metric"),
        ("compare.rivals=[]", "variants"),
    ],
)
def test_an_old_configuration_is_told_the_new_name(change, new):
    with pytest.raises(ConfigError, match=f"it is called `{new}` now"):
        load_config("digits", (change,), (), False)
