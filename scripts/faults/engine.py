"""Faults of the engine: wrong tokens, lost or shared state, unfairness; most show only in some order."""

from faults.mutant import Mutant

__all__ = ["ENGINE"]

_REUSE = ("tests/engine/test_invariance.py::test_resent_and_continued",)
_SPECULATION = ("tests/engine/test_invariance.py::test_speculation_changes_nothing",)
_CANCELLING = ("tests/engine/test_invariance.py::test_cancelled_and_resent",)
_DISK = ("tests/engine/test_disk.py",)
_SAMPLER = ("tests/engine/test_sampler.py",)
_SCHEDULING = ("tests/engine/test_scheduling.py",)
_PARALLEL = ("tests/engine/test_parallel.py::test_same_bits",)

_FAIR = """\
        pending.sort(key=lambda r: (r.served, r.arrival))
        for idx, request in enumerate(pending):
            if budget == 0 or request not in self.running:
                continue
            share = max(budget // (len(pending) - idx), min(budget, BLOCK_TOKENS))
"""

ENGINE = (
    Mutant(
        "block named without what came before it",
        "engine/block_pool.py",
        "digest = blake2b(root, digest_size=16)",
        "digest = blake2b(digest_size=16)",
        _SCHEDULING,
    ),
    Mutant(
        "drafts believed without a look",
        "engine/stepper.py",
        "if request.finish or idx == len(work.drafts) or token != work.drafts[idx]:",
        "if request.finish or idx == len(work.drafts):",
        _SPECULATION,
    ),
    Mutant(
        "rejected drafts left in the state",
        "engine/stepper.py",
        "        sequence.main.rewind(end)\n",
        "",
        _SPECULATION,
    ),
    Mutant(
        "checkpoint of another place",
        "engine/stepper.py",
        "outcome.slots[point] = sequence.main.slots(point)",
        "outcome.slots[point] = sequence.main.slots()",
        _REUSE,
    ),
    Mutant(
        "windows not brought back",
        "engine/hybrid_cache.py",
        "cold = max(end - self.recompute_tokens, 0)",
        "cold = end",
        _REUSE,
    ),
    Mutant(
        "sealed blocks written again",
        "engine/paged_cache.py",
        "sealed = self._blocks.num_sealed * self._per_block",
        "sealed = first - first % 2",
        (*_REUSE, *_DISK),
    ),
    Mutant(
        "entries of single tokens written to blocks that are shared",
        "engine/paged_cache.py",
        "is_own = self._blocks.num_sealed <= block < len(self._blocks.ids)",
        "is_own = block < len(self._blocks.ids)",
        ("tests/engine/test_decode_storage.py",),
    ),
    Mutant(
        "blocks of a cancelled request kept",
        "engine/scheduler.py",
        "            self.running.remove(request)\n            self._release(request)\n\n    def plan",
        "            self.running.remove(request)\n\n    def plan",
        _CANCELLING,
    ),
    Mutant(
        "prompts served in order of arrival",
        "engine/scheduler.py",
        _FAIR,
        _FAIR.replace("r.served, ", "").replace("budget // (len(pending) - idx)", "budget"),
        _SCHEDULING,
    ),
    Mutant(
        "damage on disk not noticed",
        "engine/disk_store.py",
        "if len(payload) == place.length and digest == _digest(payload):",
        "if len(payload) == place.length:",
        _DISK,
    ),
    Mutant(
        "another model's state taken",
        "engine/engine.py",
        'f"{self.fingerprint}|{config.weight_version}|{name}|',
        'f"{config.weight_version}|{name}|',
        _DISK,
    ),
    Mutant(
        "noise of one position for all",
        "engine/sampler.py",
        'digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()',
        'digest = blake2b(f"{seed}".encode(), digest_size=8).digest()',
        _SAMPLER,
    ),
    Mutant(
        "nucleus one token short",
        "engine/sampler.py",
        "surplus = ordered.cumsum(0) - ordered >= params.top_p",
        "surplus = ordered.cumsum(0) >= params.top_p",
        _SAMPLER,
    ),
    Mutant(
        "parts gathered in the wrong order",
        "model/sharding.py",
        "return torch.cat(parts, dim=-1)",
        "return torch.cat(parts[::-1], dim=-1)",
        _PARALLEL,
    ),
    Mutant(
        "experts of several processes summed in another order",
        "model/moe.py",
        "order_TA = routes_TA.argsort(dim=1, stable=True)",
        "order_TA = routes_TA.argsort(dim=1, stable=True, descending=True)",
        _PARALLEL,
    ),
)
