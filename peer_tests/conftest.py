"""Marks the tests that do not apply, and prints the table of results by model and policy."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from differences import NOT_APPLICABLE

MARKERS = """accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test torch_compile_test is_agent_test
    is_expert_parallel_test is_fsdp_test is_pipeline_test is_staging_test is_tensor_parallel_test is_training_test
    torch_export_test generate order""".split()
COLUMNS = ("passed", "failed", "not applicable", "skipped by transformers")
REASON = "not applicable: "

outcomes: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: a marker of transformers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        entry = NOT_APPLICABLE.get(item.name)
        if entry and item.cls.policy:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.skip(f"{REASON}{entry.reason}; see {entry.ours}"))


def pytest_runtest_logreport(report: Any) -> None:
    """Keep the worst outcome of a test, its subtests included."""
    before = outcomes.get(report.nodeid)
    if report.failed:
        outcomes[report.nodeid] = "failed"
    elif before != "failed" and (report.when == "call" or report.skipped):
        left_out = report.skipped and REASON in str(report.longrepr)
        skipped = "not applicable" if left_out else "skipped by transformers"
        if before is None or not report.skipped:
            outcomes[report.nodeid] = skipped if report.skipped else "passed"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from suite import HAS_GENERATION, ROOT

    table: dict[str, list[str]] = defaultdict(list)
    for test, outcome in outcomes.items():
        table[test.split("::")[1]].append(outcome)
    write = terminalreporter.write_line
    write(f"\ntests of {ROOT.name}")
    write(f"| model and policy | {' | '.join(COLUMNS)} |")
    write("| --- |" + " --- |" * len(COLUMNS))
    for name, found in table.items():
        write(f"| {name.replace('_', ', ')} | {' | '.join(str(found.count(column)) for column in COLUMNS)} |")
    if not HAS_GENERATION:
        write("not run: the tests of generation, which the source distribution lacks; PEER_TESTS=dir names a checkout")
