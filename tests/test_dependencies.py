"""What is installed is pinned, hashed and listed with its licence."""

import re

from lab.machine import dependencies, setup_env

PINNED = setup_env.project()["project"]["optional-dependencies"]["pinned"]


def test_every_pin_is_locked_at_its_version():
    locked = dependencies.locked()
    for pin in PINNED:
        name, version = re.match(r"([\w.-]+)==([\w.]+)", pin).groups()
        if not dependencies.WITHOUT_HASHES.match(name):
            assert version in locked[dependencies.normal(name)], (
                f"{pin}: python -m lab.machine.dependencies --lock"
            )


def test_nothing_is_locked_without_a_hash():
    blocks = re.split(
        r"\n(?=\w)", "\n" + re.sub(r"^#.*\n", "", dependencies.HASHED.read_text(), flags=re.M).strip()
    )
    assert len([b for b in blocks if b.strip()]) > 40
    for block in blocks:
        assert not block.strip() or re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), block


def test_every_locked_package_is_listed_with_a_licence():
    text = dependencies.LICENCES.read_text()
    listed = dict(re.findall(r"^\| ([\w.-]+) \| [^|]+ \| ([^|]+) \|$", text.partition("|---|")[2], re.M))
    assert set(listed) == {*dependencies.locked(), "torch"}, "python -m lab.machine.dependencies --licences"
    assert "not said" not in listed.values()


def test_dependencies_of_the_lab_are_pinned():
    pinned = {dependencies.normal(re.match(r"[\w.-]+", pin)[0]) for pin in PINNED}
    project = setup_env.project()
    for need in [*project["project"]["dependencies"], *project["build-system"]["requires"]]:
        assert dependencies.normal(re.match(r"[\w.-]+", need)[0]) in pinned
