"""A configuration survives JSON; every mistake in one is named, with its path, at once."""

import json
import re
from pathlib import Path

import pytest

from edgekd.config import BuildConfig, configured
from edgekd.core import config_file, serialization
from edgekd.errors import ConfigError


def digits():
    return config_file.read("digits")


@pytest.mark.parametrize("name", config_file.recipes())
def test_every_recipe_is_valid_and_survives_json(name):
    made = serialization.load(BuildConfig, config_file.read(name))
    assert serialization.load(BuildConfig, json.loads(json.dumps(serialization.dump(made)))) == made


def test_what_the_readme_shows_is_valid(tmp_path):
    whole, gates = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    (tmp_path / "shown.yaml").write_text(whole + gates)
    made = configured(str(tmp_path / "shown.yaml"), (), ("cpu", "jetson"), small=False)
    assert made.name == "photos" and len(made.gates) == 3
    routes = "student.method={use: kpn, routes: [{teacher: layer3.5.join, student: layer3.1.join}]}"
    (route,) = configured(str(tmp_path / "shown.yaml"), (routes,), (), small=False).student.method.routes
    for name, model in ((route.teacher, made.teacher.model), (route.student, made.student.model)):
        assert name in dict(model.build(2, 3).named_modules())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("student.method.wieght=1.0", "student.method has no `wieght`"),
        ("student.method.wieght=1.0", "did you mean `weight`?"),
        ("student.method={use: curriculum}", "student.method.base is missing\n\nhint: write `base: {use: NAME}`"),
        (
            "student.baselines=[{use: assistant, base: {use: kd}}]",
            "write `assistants: [{use: NAME}]`; `edgekd list models`",
        ),
        ("student.method.weight=big", 'student.method.weight is "big": Input should be a valid number'),
        ("student.method.use=kpm", "did you mean `kpn`?"),
        ("student.epochs=2.5", "student.epochs is 2.5: Input should be a valid integer"),
        ("teacher.model.depth=21", "teacher.model: depth is 21, which no ResNet of the CIFAR family has"),
        ("data.use=digit", "did you mean `digits`?"),
        ("data=digits", "data names no plug-in"),
        ("studnet.epochs=3", "the configuration has no `studnet`"),
        ("student.method.logits=2", "use a share between 0 and 1"),
        ("student.train.lr=-1", "use a number above 0"),
        ("name.x=1", "`name` holds no keys"),
        ("student.epochs", "names no value"),
        ("student.epochs=[", "is not YAML"),
    ],
)
def test_names_the_mistake(change, says):
    with pytest.raises(ConfigError) as error:
        configured("digits", (change,), (), False)
    assert says in str(error.value)


def test_reports_every_mistake_at_once():
    changes = ("student.method.wieght=1", "teacher.epochs=x", "data.size=4")
    with pytest.raises(ConfigError) as error:
        configured("digits", changes, (), False)
    assert all(part in str(error.value) for part in ("wieght", "teacher.epochs", "data.size"))


def test_a_missing_key_is_named():
    data = digits()
    del data["teacher"]["model"]
    with pytest.raises(ConfigError, match="teacher.model is missing"):
        serialization.load(BuildConfig, data)


def test_scientific_notation_is_a_number():
    assert configured("digits", ("student.train.lr=1e-3",), (), False).student.train.lr == 0.001


def test_a_key_that_is_there_twice_is_a_mistake(tmp_path):
    (tmp_path / "c.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match="`name` is there twice"):
        config_file.read(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("source", "says"), [("digit", "did you mean `digits`?"), ("none.yaml", "there is no file `none.yaml`")]
)
def test_a_missing_recipe_names_the_near_one(source, says):
    with pytest.raises(ConfigError) as error:
        config_file.read(source)
    assert says in str(error.value)


def test_a_target_is_chosen_by_name_and_keeps_its_settings():
    made = configured("digits", ("targets=[{use: cpu, threads: 2}]",), ("cpu",), False)
    assert [t.threads for t in made.targets] == [2]
    with pytest.raises(ConfigError, match="did you mean `cpu`"):
        configured("digits", (), ("cpuu",), False)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ("student.epochs=2.5", "write a whole number"),
        ("student.epochs=many", "write a whole number"),
        ("student.train.lr=fast", "write a number, such as 0.1"),
        ("name=3", "write a text, in quotes"),
        ("quantize.method=best", "choose one of these values"),
        ("bench.metrics=top1", "write a list"),
        ("calib=3", "write keys with values below it"),
        ("data=digits", "`edgekd list` says"),
    ],
)
def test_every_mistake_comes_with_the_fix(change, hint):
    with pytest.raises(ConfigError) as error:
        configured("digits", (change,), (), False)
    assert hint in error.value.hint


def test_a_date_stays_a_text():
    assert configured("digits", ("name=2026-01-31",), (), False).name == "2026-01-31"
    assert config_file.parse("2001-12-14 21:59:43", "here") == "2001-12-14 21:59:43"


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes("name: grün".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not a text in UTF-8: byte 8 is 0xfc"):
        config_file.read(str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_bytes("name: grün".encode())
    assert config_file.read(str(tmp_path / "c.yaml")) == {"name": "grün"}
