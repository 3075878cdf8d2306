from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from manifpt.analysis.designs import Designs, read_designs, shipped
from manifpt.errors import ConfigError
from manifpt.recipes import recipe
from manifpt.recipes import shipped as shipped_recipes

SETS = ("gm_celeba64_many", "gm_cifar10", "gm_fashionmnist", "gm_mnist")
SMALL: dict[str, Any] = {
    "choices": ["loss", "skip"],
    "generators": {"a": {"loss": "hinge", "skip": None}, "B": {"loss": "nll", "skip": "none", "unverified": ["skip"]}},
}


def read(folder: Path, text: str) -> Designs:
    path = folder / "designs.yaml"
    path.write_text(text)
    return read_designs(str(path))


def test_every_table_that_is_shipped_loads_and_has_the_same_choices() -> None:
    assert set(shipped()) == {"paper", *SETS}
    tables = [read_designs(name) for name in shipped()]
    assert len({table.choices for table in tables}) == 1
    for table in tables:
        assert set(table.value) == set(table.unverified)
        assert all(tuple(choices) == table.choices for choices in table.value.values())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_source_and_label_of_a_recipe_has_its_design_and_its_family(name: str) -> None:
    table = read_designs(name if name in SETS else "paper")
    for source in recipe(name).sources:
        family = "diffusion" if source.family == "score" else source.family
        # Sources that share a label share its design, so that either name may be asked.
        if name in SETS:
            assert table.value[source.name] == table.value[source.class_label]
        assert table.of([source.class_label], "family") == [family]


def test_the_tables_name_no_generator_that_no_recipe_has() -> None:
    for name in shipped():
        recipes = [name] if name in SETS else [each for each in shipped_recipes() if each.startswith("paper")]
        sources = [source for each in recipes for source in recipe(each).sources]
        assert set(read_designs(name).value) == {*(s.name for s in sources), *(s.class_label for s in sources)}


def test_what_is_general_knowledge_is_marked_and_what_was_read_is_not() -> None:
    paper, cifar10 = read_designs("paper"), read_designs("gm_cifar10")
    assert all(marked == {*paper.choices} - {"family"} for marked in paper.unverified.values())
    assert cifar10.unverified["chrischute_realnvp"] == frozenset()
    assert cifar10.unverified["miaojiang_gan_cifar32"] == {*cifar10.choices}


def test_values_come_in_the_order_of_the_generators_and_none_is_what_is_not_known(tmp_path: Path) -> None:
    table = read(tmp_path, yaml.safe_dump(SMALL))
    assert table.of(["B", "nobody", "a", "B"], "loss") == ["nll", None, "hinge", "nll"]
    assert table.of(["a", "B"], "skip") == [None, "none"]
    assert table.unverified == {"a": frozenset(), "B": {"skip"}}
    with pytest.raises(ConfigError, match=r"no design choice 'size'; choose loss, skip\."):
        table.of(["a"], "size")


def test_all_marks_every_choice(tmp_path: Path) -> None:
    entry = {"loss": "hinge", "skip": None, "unverified": "all"}
    assert read(tmp_path, yaml.safe_dump({**SMALL, "generators": {"a": entry}})).unverified == {"a": {"loss", "skip"}}


def test_a_table_is_read_by_uri(tmp_path: Path) -> None:
    table = read(tmp_path, yaml.safe_dump(SMALL))
    assert read_designs(f"file://{tmp_path}/designs.yaml") == table


def entry(**changes: Any) -> dict[str, Any]:
    return {**SMALL, "generators": {"a": {"loss": "hinge", "skip": None, **changes}}}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "must hold choices and generators, and nothing else"),
        ({"choices": ["loss"]}, "must hold choices and generators"),
        ({**SMALL, "notes": "x"}, "must hold choices and generators"),
        ({**SMALL, "choices": "loss"}, "choices must be a list, not 'loss'"),
        ({**SMALL, "choices": []}, "choices must be one or more"),
        ({**SMALL, "choices": ["loss", "loss"]}, "each once"),
        ({**SMALL, "choices": ["loss", "unverified"]}, "none 'unverified'"),
        ({**SMALL, "choices": ["loss", 3]}, "a choice can't be 3"),
        ({**SMALL, "generators": {}}, "generators must name one or more"),
        ({**SMALL, "generators": ["a"]}, "generators must name one or more"),
        ({**SMALL, "generators": {7: {}}}, "a generator's name can't be 7"),
        ({**SMALL, "generators": {"a": "hinge"}}, "a must hold choices and values, not 'hinge'"),
        ({**SMALL, "generators": {"a": {"loss": "hinge"}}}, "a: the choice 'skip' is missing; write null"),
        (entry(size="big"), "a: unknown choice 'size'; known: loss, skip"),
        (entry(loss=True), "a: loss can't be True"),
        (entry(loss=["hinge"]), r"a: loss can't be \['hinge'\]"),
        (entry(loss=""), "a: loss can't be ''"),
        (entry(loss="a\nb"), r"a: loss can't be 'a\\nb'; write words with single spaces"),
        (entry(loss="Hinge"), "a: loss is 'Hinge'; write lower case"),
        (entry(loss="x" * 101), "a: loss has 101 characters; write 100 or fewer"),
        (entry(unverified="loss"), "a: unverified must be a list, not 'loss'"),
        (entry(unverified=["size"]), "a: unverified names 'size'; known: loss, skip"),
        (entry(unverified=[["loss"]]), "a: unverified names"),
    ],
)
def test_what_is_no_table_is_one_sentence_that_says_where(tmp_path: Path, table: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, yaml.safe_dump(table))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/designs.yaml") and said.endswith(".") and "\n" not in said


def bomb(merges: str) -> str:
    """Sixty mappings, each twice the one before."""
    lines = [f"k{number + 1}: &a{number + 1} {{{merges.format(number)}}}" for number in range(60)]
    return "\n".join(["k0: &a0 {b: c}", *lines])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("choices: [", "is no YAML"),
        ("choices: !!python/object/apply:os.getcwd []", "is no YAML"),
        ("choices: 2026-13-41", "is no YAML"),
        ("choices: " + "[" * 2_000, "is no YAML"),
        ("choices: [a]\nchoices: [b]", "the key 'choices' stands twice"),
        (bomb("<<: [*a{0}, *a{0}]"), "merge one mapping, not several"),
        (bomb("<<: *a{0}, <<: *a{0}"), "merge one mapping, not several"),
        ("# " + "x" * (1 << 20), "has more than 1048576 bytes"),
    ],
)
def test_what_is_no_yaml_to_trust_is_one_sentence_too(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_files_that_are_not_there_are_said(tmp_path: Path) -> None:
    (tmp_path / "designs.yaml").write_bytes(b"choices: \xff")
    with pytest.raises(ConfigError, match="is no YAML"):
        read_designs(str(tmp_path / "designs.yaml"))
    with pytest.raises(ConfigError, match=r"Can't read the designs .*none\.yaml: No such file or directory\."):
        read_designs(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"no designs 'papers'; choose gm_celeba64_many, .*, paper, or a \.yaml file"):
        read_designs("papers")


WORDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789+-()", min_size=1, max_size=12)
VALUES = st.none() | st.lists(WORDS, min_size=1, max_size=4).map(" ".join)


@given(st.data())
def test_a_table_that_is_written_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    choices = data.draw(st.lists(WORDS.filter(lambda word: word != "unverified"), min_size=1, max_size=4, unique=True))
    row = st.fixed_dictionaries(dict.fromkeys(choices, VALUES))
    value = data.draw(st.dictionaries(WORDS, row, min_size=1, max_size=5))
    marked = {generator: data.draw(st.sets(st.sampled_from(choices))) for generator in value}
    generators = {name: {**row, "unverified": sorted(marked[name])} for name, row in value.items()}
    document = yaml.safe_dump({"choices": choices, "generators": generators})
    assert read(tmp_path_factory.mktemp("table"), document) == Designs(tuple(choices), value, marked)  # type: ignore[arg-type]
