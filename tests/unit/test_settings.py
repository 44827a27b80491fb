# SPDX-License-Identifier: Apache-2.0
"""The operator's settings: what is refused, and what holds where nothing is said."""

import pytest

from moe_tta.settings import EngineSettings, SettingsError

REFUSED = {
    "unknown": ({"allow_inlin": True}, "moe_tta.allow_inlin: unknown member"),
    "no object": (3, "additional_config.moe_tta: expected an object, got 3"),
    "no boolean": ({"allow_inline": 1}, "allow_inline: expected true or false, got 1"),
    "name": ({"artefacts": {"a/b": "x"}}, "expected a name"),
    "path": ({"artefacts": {"a": 3}}, "artefacts.a: expected a string, got 3"),
    "preset form": ({"presets": {"a": "b"}}, "presets.a: expected a request object"),
    "preset member": (
        {"presets": {"a": {"steer": {"drop": [[0]]}}}},
        "additional_config.moe_tta.presets.a.steer.drop[0]: expected [layer, expert]",
    ),
    "default": ({"default": "a"}, 'default is "a", which is no preset; known: none'),
    "k_max": ({"k_max": 0}, "k_max: expected greater than or equal to 1, got 0"),
}


@pytest.mark.parametrize(("value", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_in_plain_words(value, words):
    with pytest.raises(SettingsError) as caught:
        EngineSettings.read(value)
    assert words in str(caught.value)


def test_defaults():
    settings = EngineSettings.read({})
    assert not settings.allow_inline
    assert (settings.artefacts, settings.presets) == ({}, {})
    assert settings.default is settings.k_max is None
