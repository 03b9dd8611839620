"""What a collection decides, on stores drawn at random too: nothing reached goes, nothing old and unreached stays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from infra.artifacts.gc_plan import (
    LEASE_S,
    LEASED,
    MIN_AGE_S,
    YOUNG,
    GcPlan,
    Inventory,
    Line,
    Links,
    Roots,
    plan_gc,
    reachable,
    shared_hash,
    summary,
)
from infra.store.admin import PendingUpload, StoredObject
from infra.store.layout import manifest_name

NOW = datetime(2026, 1, 31, tzinfo=UTC)
OLD, NEW = timedelta(seconds=MIN_AGE_S), timedelta(seconds=MIN_AGE_S - 1)


def key(number: int) -> str:
    return f"{number:064x}"


@dataclass
class World:
    """A store to fill by hand; sizes are powers of two, so that a sum says what is in it."""

    objects: list[StoredObject] = field(default_factory=list)
    links: dict[str, Links | None] = field(default_factory=dict)
    uploads: list[tuple[PendingUpload, int]] = field(default_factory=list)
    mentions: dict[str, frozenset[str]] = field(default_factory=dict)

    def add(self, name: str, age: timedelta = OLD, size: int = 1) -> str:
        self.objects.append(StoredObject(name, size, NOW - age, '"e"'))
        return name

    def artifact(self, number: int, inputs: tuple[int, ...] = (), age: timedelta = OLD, data: timedelta = OLD) -> None:
        self.add(manifest_name(key(number)), age)
        names = [self.add(f"objects/{key(number)}/won/{label}", data) for label in ("a", "b")]
        self.links[key(number)] = Links(frozenset(map(key, inputs)), frozenset(names), "node")

    def plan(
        self, *roots: int, runs: tuple[str, ...] = (), attempts: tuple[str, ...] = (), min_age_s: float = MIN_AGE_S
    ) -> GcPlan:
        inventory = Inventory(NOW, tuple(self.objects), tuple(self.uploads), self.links, self.mentions)
        return plan_gc(Roots(frozenset(map(key, roots)), frozenset(runs), frozenset(attempts)), inventory, min_age_s)


def goes(plan: GcPlan) -> set[str]:
    """Names of the objects that a plan removes; of nothing twice."""
    names = [found.name for removal in plan.removals for found in removal.objects]
    names += [removal.manifest.name for removal in plan.removals if removal.manifest]
    assert len(names) == len(set(names))
    return set(names)


def test_what_roots_reach_over_inputs_stays() -> None:
    world = World()
    world.artifact(1)
    world.artifact(2, (1,))
    world.artifact(3, (2,))
    world.artifact(4, (1,))
    plan = world.plan(3)
    assert [removal.key for removal in plan.removals] == [key(4)]
    assert goes(plan) == {manifest_name(key(4)), f"objects/{key(4)}/won/a", f"objects/{key(4)}/won/b"}
    assert plan.kept == 3
    assert plan.size == 3
    assert len(goes(world.plan())) == 12


def test_what_is_young_or_leased_stays_with_its_inputs() -> None:
    world = World()
    world.artifact(1)
    world.artifact(2, (1,), age=NEW)
    world.artifact(3)
    world.artifact(4, (3,), data=NEW)
    world.artifact(5)
    world.artifact(6, (5,))
    world.add(f"leases/{key(6)}.json", NEW)
    world.artifact(7)
    world.add(f"leases/{key(7)}.json", OLD)
    plan = world.plan()
    assert [(removal.kind, removal.key) for removal in plan.removals] == [("artifact", key(7)), ("lease", key(7))]
    assert {(spared.key, spared.reason) for spared in plan.spared} == {
        *((key(number), YOUNG) for number in (2, 4)),
        (key(6), LEASED),
        *((key(number), "input of what is spared") for number in (1, 3, 5)),
    }


def test_attempts_that_no_manifest_names() -> None:
    world = World()
    world.artifact(1)
    world.add(f"objects/{key(1)}/won/stray")  # of the attempt that won: stays and goes with it
    world.add(f"objects/{key(1)}/lost/a")
    world.add(f"objects/{key(2)}/begun/a")
    world.add(f"objects/{key(3)}/begun/a")
    world.add(f"objects/{key(3)}/begun/b", NEW)  # the attempt is still going on
    world.add(f"objects/{key(4)}/begun/a")
    world.add(f"leases/{key(4)}.json", NEW)
    plan = world.plan(1, 2, 3, 4)
    assert goes(plan) == {f"objects/{key(1)}/lost/a", f"objects/{key(2)}/begun/a"}
    assert {(spared.key, spared.reason) for spared in plan.spared} == {(key(3), YOUNG), (key(4), LEASED)}
    assert f"objects/{key(1)}/won/stray" in goes(world.plan())


def test_a_manifest_that_cannot_be_read_keeps_its_data_while_it_is_reached() -> None:
    world = World()
    world.artifact(1)
    world.links[key(1)] = None
    assert goes(world.plan(1)) == set()
    assert len(goes(world.plan())) == 3


def test_states_of_unfinished_reached_trainings_stay() -> None:
    world = World()
    world.artifact(1)
    for number in range(1, 6):
        world.add(f"checkpoints/{key(number)}/10-x", OLD)
        world.add(f"checkpoints/{key(number)}.json", NEW if number == 4 else OLD)
    world.add(f"leases/{key(5)}.json", NEW)
    plan = world.plan(1, 2)  # 1 finished, 2 begun, 3 unreached, 4 unreached and young, 5 unreached and leased
    assert [removal.key for removal in plan.of("checkpoint")] == [key(1), key(3)]
    assert plan.of("checkpoint")[0].objects[0].name == f"checkpoints/{key(1)}.json"  # the pointer first
    assert {(spared.key, spared.reason) for spared in plan.spared} == {(key(4), YOUNG), (key(5), LEASED)}


def test_uploads_and_runs() -> None:
    world = World()
    for number, age in ((1, OLD), (2, NEW), (3, OLD)):
        upload = PendingUpload(f"objects/{key(number)}/x/f", f"u{number}", NOW - age)
        world.uploads.append((upload, 2**number))
    world.add(f"leases/{key(3)}.json", NEW)
    for run, age in (("kept", OLD), ("gone", OLD), ("late", NEW)):
        world.add(f"runs/{run}/results.json", age, 16)
        world.add(f"runs/{run}/keys.json", OLD, 32)
    plan = world.plan(runs=("kept",))
    assert [(removal.kind, removal.key) for removal in plan.removals] == [("upload", key(1)), ("run", "gone")]
    assert plan.size == 2 + 16 + 32
    assert {(spared.kind, spared.key, spared.reason) for spared in plan.spared} == {
        ("upload", key(2), YOUNG),
        ("upload", key(3), LEASED),
        ("run", "late", YOUNG),
    }


def test_bytes_that_a_registered_version_names_stay_though_the_manifest_names_others() -> None:
    world = World()
    world.artifact(1)
    for attempt in ("replaced", "lost"):
        world.add(f"objects/{key(1)}/{attempt}/adapter")
    world.add(f"objects/{key(2)}/replaced/adapter")  # the manifest is gone altogether
    pinned = (f"objects/{key(1)}/replaced", f"objects/{key(2)}/replaced")
    assert goes(world.plan(1, attempts=pinned)) == {f"objects/{key(1)}/lost/adapter"}
    assert len(goes(world.plan(1))) == 3


def test_an_artifact_whose_bytes_a_registered_version_names_stays_with_its_inputs() -> None:
    world = World()
    world.artifact(1)
    world.artifact(2, (1,))
    assert goes(world.plan(attempts=(f"objects/{key(2)}/won",))) == set()


def test_what_others_put_beside_the_artifacts_stays() -> None:
    world = World()
    for name in (
        "objects/notes.txt", "objects/models/a/b", f"objects/{key(1)[:-1]}/x/w", f"objects/{key(1)}",
        "checkpoints/README", "checkpoints/mine/model.pt", f"checkpoints/{key(1)}.json.bak",
        f"checkpoints/{'G' * 64}/1-x",
    ):  # fmt: skip
        world.add(name)
    ours = [world.add(f"objects/{key(1)}/x/w"), world.add(f"checkpoints/{key(1)}/1-x")]
    for name in ("objects/backup.tar", "checkpoints/mine/model.pt", "bases/mine/w", f"objects/{key(2)}/x/w"):
        world.uploads.append((PendingUpload(name, "u", NOW - OLD), 1))
    plan = world.plan()
    assert goes(plan) == set(ours)
    assert [removal.key for removal in plan.of("upload")] == [key(2)]
    assert plan.spared == ()


def test_rows_and_bases_stay_with_whatever_names_them() -> None:
    world = World()
    for number in (1, 2, 3):
        world.artifact(number, age=NEW if number == 3 else OLD)
        world.mentions[key(number)] = frozenset({key(10 + number), key(20 + number)})
    world.links[key(1)] = None  # unreadable
    for number in (11, 12, 13, 14, 15):
        world.add(f"data/{key(number)}.jsonl", NEW if number == 15 else OLD)
    for number in (21, 22, 24, 25):
        world.add(f"bases/{key(number)}/model.safetensors", OLD)
        world.add(f"bases/{key(number)}/index.json", NEW if number == 25 else OLD)
    for name in ("data/readme.jsonl", "data/README", "bases/notes", f"bases/{key(9)}", "schedules/nightly.json"):
        world.add(name)

    plan = world.plan(1, 2)
    assert [(r.kind, r.key) for r in plan.removals] == [("base", key(24)), ("rows", key(14))]
    assert [found.name for found in plan.of("base")[0].objects] == [
        f"bases/{key(24)}/index.json", f"bases/{key(24)}/model.safetensors"
    ]  # fmt: skip
    assert {(spared.kind, spared.key) for spared in plan.spared if spared.reason == YOUNG} >= {
        ("rows", key(15)), ("base", key(25))
    }  # fmt: skip
    assert not goes(world.plan(1, 2, 14, 24))  # announced, or named by a registered version
    without = goes(world.plan(1))  # what goes takes its rows and its base along
    assert {f"data/{key(12)}.jsonl", f"bases/{key(22)}/index.json", manifest_name(key(2))} <= without
    assert f"data/{key(13)}.jsonl" not in without  # named by what is young
    assert shared_hash(f"data/{key(1)}.jsonl") == ("rows", key(1))


def test_old_probes_go() -> None:
    world = World()
    world.add("checks/a")
    world.add("checks/b", NEW)
    assert goes(world.plan()) == {"checks/a"}


def test_a_live_lease_protects_however_small_the_minimal_age_is() -> None:
    world = World()
    for number, renewed_s in ((1, LEASE_S - 1), (2, LEASE_S)):
        world.artifact(number, age=NEW)
        world.add(f"objects/{key(number)}/begun/a", NEW)
        world.add(f"leases/{key(number)}.json", timedelta(seconds=renewed_s))
    plan = world.plan(min_age_s=0.0)
    assert {removal.key for removal in plan.removals} == {key(2)}
    assert {(spared.kind, spared.reason) for spared in plan.spared} == {("artifact", LEASED), ("orphan", LEASED)}


def test_the_summary_says_how_much_goes_and_why_the_rest_stays() -> None:
    world = World()
    world.artifact(1)
    world.artifact(2, age=NEW)
    world.artifact(4)
    world.links[key(4)] = None
    world.add(f"objects/{key(3)}/x/f", size=1_500_000)
    assert summary(world.plan()) == [
        Line("artifact", "", 1, 3),  # unreadable, so of no known kind
        Line("artifact", "node", 1, 3),
        Line("orphan", "", 1, 1_500_000),
        Line("artifact", "node", 1, 3, YOUNG),
    ]


# -- stores drawn at random --------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 7)
AGES = st.sampled_from([OLD, OLD, OLD, NEW])


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, set[int]]:
    world = World()
    for number in draw(st.sets(NUMBERS)):
        inputs = draw(st.sets(NUMBERS, max_size=3))  # cycles cannot occur in a store, and must not matter
        world.artifact(number, tuple(inputs), draw(AGES), draw(AGES))
        if draw(st.integers(0, 9)) == 0:
            world.links[key(number)] = None
    for number in draw(st.sets(NUMBERS)):
        world.add(f"objects/{key(number)}/lost/a", draw(AGES))
    for number in draw(st.sets(NUMBERS)):
        world.add(f"checkpoints/{key(number)}.json", draw(AGES))
        world.add(f"checkpoints/{key(number)}/1-x", draw(AGES))
    for number in draw(st.sets(NUMBERS, max_size=2)):
        world.add(f"leases/{key(number)}.json", draw(AGES))
    for number in draw(st.sets(NUMBERS, max_size=2)):
        world.uploads.append((PendingUpload(f"objects/{key(number)}/u/f", "u", NOW - draw(AGES)), 1))
    return world, draw(st.sets(NUMBERS, max_size=3))


def _owner(name: str) -> str:
    return name.split("/")[1].removesuffix(".json")


def _closure(roots: set[str], links: Mapping[str, Links | None]) -> set[str]:
    """Reachability as its definition says it: add inputs until nothing changes."""
    while True:
        more = roots | {source for k in roots if (named := links.get(k)) for source in named.inputs}
        if more == roots:
            return roots
        roots = more


@settings(max_examples=300)
@given(worlds())
def test_nothing_reached_goes_and_nothing_old_stays_unreached(drawn: tuple[World, set[int]]) -> None:
    world, roots = drawn
    plan = world.plan(*roots)
    removed = goes(plan)
    reached = _closure(set(map(key, roots)), world.links)
    assert reached == reachable(map(key, roots), world.links)
    young = {found.name for found in world.objects if NOW - found.modified < OLD}
    leased = {_owner(name) for name in young if name.startswith("leases/")}
    named = {name for k, links in world.links.items() if links for name in links.files}
    # Never: young, under a live lease, or needed to use or resume what roots reach.
    assert not removed & young
    assert not {_owner(name) for name in removed} & leased
    for k in reached & world.links.keys():
        links = world.links[k]
        assert manifest_name(k) not in removed
        assert not removed & (links.files if links else set())
    assert not {n for n in removed if n.startswith("checkpoints/")} & {
        f"checkpoints/{k}.json" for k in reached - world.links.keys()
    }
    # Always: whatever is old, unreached, and not needed by anything that is young or leased.
    fresh = {_owner(name) for name in young if not name.startswith(("checkpoints/", "leases/"))} | leased
    guarded = _closure(set(fresh), world.links)
    for found in world.objects:
        folder, owner = found.name.split("/")[0], _owner(found.name)
        siblings = {name for name in young if name.startswith(f"{folder}/{owner}")}
        if folder in ("artifacts", "objects") and owner not in reached | guarded:
            assert found.name in removed
        elif folder == "objects" and "/lost/" in found.name and owner in world.links and not siblings:
            unreadable = world.links[owner] is None  # then it goes with the manifest
            gone = manifest_name(owner) in removed if unreadable else owner not in leased
            assert (found.name in removed) == gone
        elif folder == "checkpoints" and not siblings and owner not in leased:
            assert (found.name in removed) == (owner in world.links or owner not in reached)
        elif folder == "leases":
            assert (found.name in removed) == (found.name not in young)
    assert plan.size == len(removed) + len(plan.of("upload"))
    # What stays is whole: no manifest without its data.
    for k, links in world.links.items():
        if links and manifest_name(k) not in removed:
            assert not removed & links.files
    assert named - removed == {
        n for k, v in world.links.items() if v and manifest_name(k) not in removed for n in v.files
    }
