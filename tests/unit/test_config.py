"""The policy: what it accepts, what it says when it refuses, and what its keys amount to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferos.config import (
    KV_WORDS,
    MODES,
    PRESETS,
    SCORER_OPTIONS,
    KvPolicy,
    Policy,
    Thresholds,
    check_kv,
    environment_changes,
    json_schema,
    kv_changes,
    load_policy,
    parse_size,
)
from inferos.errors import ConfigError

# SPEC table: name -> L1, L2, L3, window, max delta PPL.
MODE_TABLE = [
    ("dynamic", (1, 0.7, 0.3), 64, 0.5),
    ("latency_optimized", (1, 0.5, 0.2), 128, 0.3),
    ("throughput_optimized", (1, 1, 0.4), 32, 0.5),
    ("quality_optimized", (1, 0, 0), 256, 0.1),
    ("disabled", (0, 0, 0), 64, 0.5),
]
PRESET_TABLE = [
    ("mission", (0.7, 0.5, 0.3), 64),
    ("7b", (0.7, 0.5, 0.3), 64),
    ("3b", (0.6, 0.4, 0.2), 128),
    ("conservative", (0.6, 0.4, 0.2), 128),
    ("dml_unavailable", (0.6, 0.4, 0.2), 128),
    ("13b", (0.8, 0.6, 0.4), 32),
    ("20b", (0.8, 0.6, 0.4), 32),
    ("memory_pressure", (0.8, 0.6, 0.4), 32),
    ("npu_thermal", (0.65, 0.45, 0.25), 96),
    ("quality_degradation", (0.5, 0.3, 0.1), 256),
]
L2_ONLY = {"L1_int8": 1, "L2_int4": 1, "L3_evict": 0}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kv": {"recent_window": 9}}, "kv.recent_window: 9 is not within 16..512"),
    ({"kv": {"recent_window": "64"}}, "kv.recent_window: '64' is not an integer within 16..512"),
    ({"kv": {"recent_window": 64.5}}, "kv.recent_window: 64.5 is not an integer within 16..512"),
    ({"kv": {"recent_window": True}}, "kv.recent_window: True is not an integer within 16..512"),
    ({"kv": {"sink_tokens": 65}}, "kv.sink_tokens: 65 is not within 0..64"),
    ({"kv": {"mode": "fast"}}, "kv.mode: 'fast' is not one of dynamic, latency_optimized,"),
    ({"kv": {"preset": "70b"}}, "kv.preset: '70b' is not one of mission, 7b,"),
    ({"kv": {"widow": 1}}, "kv.widow: unknown key; known here: mode, preset, recent_window"),
    ({"kw": {}}, "kw: unknown key; known here: kv, io, scheduler"),
    ({"kv": 5}, "kv: 5 is not a mapping"),
    ({"kv": None}, "kv: None is not a mapping"),
    ({"kv": {"level_thresholds": {"L1_int8": 1.5}}}, "kv.level_thresholds.L1_int8: 1.5 is not within 0..1"),
    ({"kv": {"level_thresholds": {"L1_int8": 0.1}}}, "kv.level_thresholds: L1_int8 0.1, L2_int4 0.7, L3_evict 0.3"),
    ({"kv": {"layer_overrides": {"x": {"max_level": "L1"}}}}, "kv.layer_overrides.x: 'x' is not a layer's number"),
    ({"kv": {"layer_overrides": {0: {"max_level": "L1"}}}}, "kv.layer_overrides.0: 0 is not a layer's number"),
    ({"kv": {"layer_overrides": {"0": {"max_level": "L9"}}}}, "kv.layer_overrides.0.max_level: 'L9' is not one of L0,"),
    ({"kv": {"layer_overrides": {"0": {}}}}, "kv.layer_overrides.0.max_level: missing"),
    ({"kv": {"scorer": "mine"}}, "kv.scorer: 'mine' is not one of attention_ema, attention_mass, key_norm,"),
    ({"kv": {"scorer": 5}}, "kv.scorer: 5 is not a name"),
    ({"kv": {"scorer_options": {"gamma": -1}}}, "kv.scorer_options.gamma: -1 is not above 0 and below 1"),
    ({"kv": {"scorer_options": 5}}, "kv.scorer_options: 5 is not a mapping"),
    ({"kv": {"scorer_options": {"pool": 3}}}, "kv.scorer_options.pool: unknown key; known here: gamma"),
    (
        {"kv": {"scorer": "recency", "scorer_options": {"gamma": 0.9}}},
        "kv.scorer_options.gamma: unknown key; known here: none",
    ),
    ({"kv": {"scorer_options": {"gamma": 1}}}, "kv.scorer_options.gamma: 1 is not above 0 and below 1"),
    ({"kv": {"scorer": "snapkv", "scorer_options": {"pool": 4}}}, "kv.scorer_options.pool: 4 is even, wanted an odd"),
    (
        {"kv": {"scorer": "snapkv", "scorer_options": {"pool": 65}}},
        "kv.scorer_options.pool: 65 is not within 1..63",
    ),
    ({"io": {"host_pool_bytes": "1MiB"}}, "io.host_pool_bytes: 1048576 is not a size of at least 16MiB"),
    ({"io": {"host_pool_bytes": "lots"}}, "io.host_pool_bytes: 'lots' is not a size"),
    ({"io": {"enable_iobinding": 1}}, "io.enable_iobinding: 1 is not true or false"),
    ({"quality": {"max_delta_ppl": float("nan")}}, "quality.max_delta_ppl: nan is not within 0..2"),
    ({"quality": {"max_delta_ppl": float("inf")}}, "quality.max_delta_ppl: inf is not within 0..2"),
    ({"quality": {"min_accept_rate": "0.5"}}, "quality.min_accept_rate: '0.5' is not within 0..1"),
    ({"scheduler": {"decode_device": "gpu"}}, "scheduler.decode_device: 'gpu' is not one of npu, dml, cpu, auto"),
    ({"loops": {"fast_ms": 0}}, "loops.fast_ms: 0 is not within 1..60000"),
]


def shares(policy: Policy) -> tuple[float, float, float]:
    found = policy.resolve().thresholds
    return found.l1_int8, found.l2_int4, found.l3_evict


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[m.partition(":")[0] for _, m in REFUSED])
def test_a_refusal_names_the_path_the_value_and_what_is_right(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Policy.from_mapping(values)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[m.partition(":")[0] for _, m in REFUSED])
def test_a_refused_update_changes_nothing(values: dict[str, Any], message: str) -> None:
    policy = Policy.from_mapping({"kv": {"sink_tokens": 7}})
    before = policy.model_dump()
    with pytest.raises(ConfigError):
        policy.update(values)
    assert policy.model_dump() == before


def test_two_wrong_keys_are_both_named() -> None:
    with pytest.raises(ConfigError, match=r"kv\.recent_window: 1 .*; kv\.sink_tokens: 99 "):
        Policy.from_mapping({"kv": {"recent_window": 1, "sink_tokens": 99}})


def test_a_partial_update_keeps_every_other_key() -> None:
    start = {"kv": {"mode": "latency_optimized", "sink_tokens": 8}, "io": {"host_pool_bytes": "1GiB"}}
    policy = Policy.from_mapping(start).update({"kv": {"recent_window": 32}})
    assert policy.requested() == {
        "kv": {"mode": "latency_optimized", "sink_tokens": 8, "recent_window": 32},
        "io": {"host_pool_bytes": 1 << 30},
    }


def test_an_update_does_not_touch_the_mapping_it_was_given() -> None:
    changes = {"kv": {"layer_overrides": {"0": {"max_level": "L1"}}}}
    policy = Policy().update(changes)
    changes["kv"]["layer_overrides"]["0"]["max_level"] = "L3"
    assert policy.kv.layer_overrides["0"].max_level == "L1"


def test_a_null_override_removes_that_layer_only() -> None:
    policy = Policy.from_mapping({"kv": {"layer_overrides": {"0": {"max_level": "L1"}, "-1": {"max_level": "L2"}}}})
    assert set(policy.update({"kv": {"layer_overrides": {"0": None}}}).kv.layer_overrides) == {"-1"}


def test_the_outer_key_may_be_there_or_not() -> None:
    inner = {"kv": {"sink_tokens": 2}}
    assert Policy.from_mapping({"infer_os": inner}) == Policy.from_mapping(inner)
    assert Policy().update({"infer_os": inner}) == Policy().update(inner)


@pytest.mark.parametrize(("mode", "levels", "window", "bound"), MODE_TABLE)
def test_a_mode_sets_thresholds_window_and_bound(
    mode: str, levels: tuple[float, ...], window: int, bound: float
) -> None:
    policy = Policy.from_mapping({"kv": {"mode": mode}})
    resolved = policy.resolve()
    assert (shares(policy), resolved.recent_window, resolved.max_delta_ppl) == (levels, window, bound)


@pytest.mark.parametrize(("preset", "levels", "window"), PRESET_TABLE)
def test_a_preset_sets_thresholds_and_window(preset: str, levels: tuple[float, ...], window: int) -> None:
    policy = Policy.from_mapping({"kv": {"preset": preset}})
    assert (shares(policy), policy.resolve().recent_window) == (levels, window)


def test_the_schema_knows_exactly_the_tables_names() -> None:
    fields = KvPolicy.model_fields
    assert set(get_args(fields["mode"].annotation)) == set(MODES) == {row[0] for row in MODE_TABLE}
    names = get_args(get_args(fields["preset"].annotation)[0])
    assert set(names) == set(PRESETS) == {row[0] for row in PRESET_TABLE}


def test_two_presets_move_the_scheduler() -> None:
    assert Policy.from_mapping({"kv": {"preset": "3b"}}).resolve().scheduler_mode == "gpu_only"
    assert Policy.from_mapping({"kv": {"preset": "npu_thermal"}}).resolve().decode_device == "dml"


def test_a_key_set_by_hand_wins_over_preset_and_mode() -> None:
    kv = {"preset": "3b", "mode": "quality_optimized", "recent_window": 64, "level_thresholds": {"L2_int4": 0.5}}
    policy = Policy.from_mapping({"kv": kv, "quality": {"max_delta_ppl": 0.4}})
    resolved = policy.resolve()
    assert (shares(policy), resolved.recent_window, resolved.max_delta_ppl) == ((0.6, 0.5, 0.2), 64, 0.4)


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_only_ordered_thresholds_are_accepted(levels: tuple[float, float, float]) -> None:
    values = {"kv": {"level_thresholds": dict(zip(("L1_int8", "L2_int4", "L3_evict"), levels, strict=True))}}
    if levels[0] >= levels[1] >= levels[2]:
        assert shares(Policy.from_mapping(values)) == levels
    else:
        with pytest.raises(ConfigError, match="not in order"):
            Policy.from_mapping(values)


@pytest.mark.parametrize(
    ("word", "levels"), [("f16", (0, 0, 0)), ("int8", (1, 0, 0)), ("k8v4", (1, 1, 0)), ("int4", (1, 1, 0))]
)
def test_a_fixed_kv_word_is_its_thresholds_and_back(word: str, levels: tuple[float, ...]) -> None:
    policy = Policy.from_mapping({"kv": {"mode": "latency_optimized"}}).update(kv_changes(word))
    assert (shares(policy), policy.resolve().kv) == (levels, word)


def test_auto_leaves_the_policy_to_its_mode() -> None:
    assert kv_changes("auto") == {}
    assert Policy().resolve().kv == "auto"
    assert Policy.from_mapping({"kv": {"mode": "disabled"}}).resolve().kv == "f16"
    assert Policy.from_mapping({"kv": {"mode": "quality_optimized"}}).resolve().kv == "int8"


@pytest.mark.parametrize("word", ["int3", "", None, 8, ["int8"]])
def test_an_unknown_kv_word_is_refused_with_the_known_ones(word: object) -> None:
    with pytest.raises(ConfigError, match=r"^kv: .* is not one of off, f16, int8, k8v4, int4, auto$"):
        check_kv(word)


def test_every_kv_word_is_accepted() -> None:
    assert [check_kv(word) for word in KV_WORDS] == ["off", "f16", "int8", "k8v4", "int4", "auto"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (2147483648, 1 << 31),
        ("2147483648", 1 << 31),
        ("2GiB", 1 << 31),
        ("2gib", 1 << 31),
        ("2048MiB", 1 << 31),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 << 29),
        (" 64 KiB ", 1 << 16),
        ("7b", 7),
        ("3kb", 3000),
        ("4MB", 4_000_000),
    ],
)
def test_a_size_in_any_unit_is_that_many_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "2TiB", "2 G", "٢GiB", "1" * 40, None, 1.5, True, "1ib"])
def test_what_is_not_a_size_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.yaml", "infer_os:\n  kv: {preset: 3b, sink_tokens: 8}\n  io: {host_pool_bytes: 2GiB}\n"),
        ("p.json", '{"kv": {"preset": "3b", "sink_tokens": 8}, "io": {"host_pool_bytes": "2GiB"}}'),
    ],
)
def test_a_file_is_read_as_the_same_policy(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    wanted = {"kv": {"preset": "3b", "sink_tokens": 8}, "io": {"host_pool_bytes": 2 << 30}}
    assert load_policy(tmp_path / name) == Policy.from_mapping(wanted)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "kv: [", "p.yaml: "),
        ("p.yaml", "a: &a [1]\nb: *a\n", "aliases are not allowed"),
        ("p.yaml", "kv: {sink_tokens: 1}\nkv: {}\n", "'kv' is given twice"),
        ("p.yaml", "kv: {layer_overrides: {0: {max_level: L1}}}\n", "key 0 is not a string"),
        ("p.yaml", "- 1\n", "is not a mapping"),
        ("p.yaml", "", "None is not a mapping"),
        ("p.yaml", "kv: !!python/object/apply:os.system [id]\n", "could not determine a constructor"),
        ("p.json", "{", "p.json: "),
        ("p.json", '{"kv": {}, "kv": {}}', "'kv' is given twice"),
        ("p.json", '{"quality": {"max_delta_ppl": NaN}}', "nan is not within 0..2"),
        ("p.json", "[" * 100_000, "p.json: "),
        ("p.json", " " * (1 << 20) + " {}", "larger than"),
    ],
)
def test_a_bad_file_is_a_config_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_policy(tmp_path / name)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_policy(tmp_path / "absent.yaml")


def test_a_policy_does_not_change() -> None:
    with pytest.raises(Exception, match="frozen"):
        Policy().kv.sink_tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize(("given", "held"), [("auto", "auto"), ("k8v4", "k8v4"), ("k4v4", "int4")])
def test_the_format_of_the_lowest_level_is_the_caches_own_name(given: str, held: str) -> None:
    policy = Policy.from_mapping({"kv": {"l2_format": given, "level_thresholds": L2_ONLY}})
    assert policy.resolve().l2_format == held
    assert policy.resolve().kv == held


def test_thresholds_between_two_formats_mean_no_fixed_one() -> None:
    assert Thresholds(1, 0.7, 0.3).fixed_format("k8v4") is None


# Scorers -----------------------------------------------------------------------------------------------------------


def test_every_scorer_is_a_name_of_the_policy_and_its_options_are_its_own() -> None:
    scorers = pytest.importorskip("inferos.kv.scorers")
    assert sorted(SCORER_OPTIONS) == sorted(scorers.SCORERS)
    for name, kind in SCORER_OPTIONS.items():
        assert Policy.from_mapping({"kv": {"scorer": name}}).resolve().scorer == name
        if name != "attention_ema":  # the cache's own: `gamma` is the cache's
            assert {key: field.default for key, field in kind.model_fields.items()} == {
                field.name: field.default for field in dataclasses.fields(scorers.SCORERS[name])
            }


def test_another_scorer_begins_with_its_own_options() -> None:
    policy = Policy.from_mapping({"kv": {"scorer_options": {"gamma": 0.9}, "sink_tokens": 8}})
    assert policy.resolve().gamma == 0.9
    changed = policy.update({"kv": {"scorer": "snapkv"}})
    assert (changed.kv.scorer_options, changed.kv.sink_tokens, changed.resolve().gamma) == ({}, 8, 0.997)
    assert policy.update({"kv": {"sink_tokens": 1}}).kv.scorer_options == {"gamma": 0.9}


# Layers ------------------------------------------------------------------------------------------------------------


def overrides(**levels: str) -> KvPolicy:
    found = {key.replace("m", "-").strip("_"): {"max_level": level} for key, level in levels.items()}
    return Policy.from_mapping({"kv": {"layer_overrides": found}}).kv


def test_layers_count_from_both_ends() -> None:
    assert overrides(_0="L1", m1="L2", m3="L0").max_levels(4) == ("L1", "L0", "L3", "L2")
    assert KvPolicy().max_levels(4) is None


@pytest.mark.parametrize("key", ["4", "-5", "-0"])
def test_a_layer_that_is_not_there_is_refused_with_how_many_there_are(key: str) -> None:
    policy = Policy.from_mapping({"kv": {"layer_overrides": {key: {"max_level": "L1"}}}})
    with pytest.raises(ConfigError, match=rf"kv\.layer_overrides\.{key}: no such layer; the model has 4 .* -4\.\.3$"):
        policy.kv.max_levels(4)


def test_two_overrides_of_one_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv\.layer_overrides\.-4: the same layer as 0"):
        overrides(_0="L1", m4="L2").max_levels(4)


# The environment ---------------------------------------------------------------------------------------------------


def test_an_environment_variable_is_a_keys_path() -> None:
    changes = environment_changes(
        {
            "INFEROS_KV__RECENT_WINDOW": "128",
            "INFEROS_KV__PRESET": "7b",
            "INFEROS_KV__LEVEL_THRESHOLDS__L1_INT8": "0.9",
            "INFEROS_KV__LAYER_OVERRIDES": '{"-1": {"max_level": "L1"}}',
            "inferos_io__host_pool_bytes": " 2GiB ",
            "INFEROS_IO__ENABLE_IOBINDING": "False",
            "INFEROS_ENABLED": "false",
            "OTHER__KV": "1",
        }
    )
    assert changes == {
        "kv": {
            "recent_window": 128,
            "preset": "7b",
            "level_thresholds": {"L1_int8": 0.9},
            "layer_overrides": {"-1": {"max_level": "L1"}},
        },
        "io": {"host_pool_bytes": "2GiB", "enable_iobinding": False},
    }
    Policy().update(changes)


def test_the_caller_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    environ = {"INFEROS_KV__SINK_TOKENS": "8", "INFEROS_KV__RECENT_WINDOW": "32"}
    (tmp_path / "p.yaml").write_text("kv: {sink_tokens: 2, mode: quality_optimized}")
    from_file = load_policy(tmp_path / "p.yaml", environ).kv
    assert (from_file.sink_tokens, from_file.recent_window, from_file.mode) == (8, 32, "quality_optimized")
    given = load_policy({"kv": {"sink_tokens": 1}}, environ).kv
    assert (given.sink_tokens, given.recent_window) == (1, 32)
    assert load_policy(Policy(), environ) == Policy()
    assert load_policy(None, {}) == Policy()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"INFEROS_KV__WIDOW": "1"}, r"environment variables INFEROS_\*: kv\.widow: unknown key"),
        ({"INFEROS_KV__SINK_TOKENS": "99"}, r"environment variables INFEROS_\*: kv\.sink_tokens: 99 is not within"),
        ({"INFEROS_KV__SINK_TOKENS": "1", "inferos_kv__sink_tokens": "2"}, "also set by another"),
        ({"INFEROS_KV__SINK_TOKENS__X": "1", "INFEROS_KV__SINK_TOKENS": "2"}, "also set by another"),
    ],
)
def test_a_bad_environment_variable_is_a_config_error(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(None, environ)


# The JSON schema ---------------------------------------------------------------------------------------------------


def test_the_exported_json_schema_is_current() -> None:
    exported = Path(__file__).parents[2] / "docs/policy.schema.json"
    assert json.loads(exported.read_text("utf-8")) == json_schema(), (
        "run: python -m inferos.config > docs/policy.schema.json"
    )


def test_the_json_schema_accepts_and_refuses_what_the_policy_does() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    accepted = [
        {},
        {"infer_os": {"kv": {"preset": "3b"}}},
        {"kv": {"scorer": "snapkv", "scorer_options": {"pool": 7}}, "io": {"host_pool_bytes": "2GiB"}},
        {"kv": {"scorer_options": {"gamma": 0.9}, "layer_overrides": {"-1": {"max_level": "L1"}}}},
    ]
    for values in accepted:
        Policy.from_mapping(values)
        validator.validate(values)
    # JSON has no NaN and no keys but strings; sizes in words, odd numbers, the order of thresholds are beyond a schema.
    beyond = ("nan", "{0:", "1MiB", "'L1_int8': 0.1", "'pool': 4")
    for values in (values for values, _ in REFUSED if not any(word in str(values) for word in beyond)):
        assert not validator.is_valid(values), values
