"""The architecture: every room has one door. (`lint-imports` checks that imports point down.)"""

from __future__ import annotations

import sys

import grimp

PACKAGE = "sparsellm_lightning"


def test_other_rooms_import_a_room_and_not_its_files() -> None:
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    rooms = {name for name in graph.find_children(PACKAGE) if graph.find_children(name)}
    assert len(rooms) > 10
    through_walls = [
        f"{importer} imports {imported}"
        for room in rooms
        for imported in graph.find_descendants(room)
        for importer in graph.find_modules_that_directly_import(imported)
        if not f"{importer}.".startswith(f"{room}.")
    ]
    assert not through_walls


def test_solvers_import_torch_and_each_other() -> None:
    graph = grimp.build_graph(PACKAGE, include_external_packages=True, cache_dir=None)
    allowed = {"torch", "numpy", "transformers", *sys.stdlib_module_names}
    for module in graph.find_descendants(f"{PACKAGE}.solvers"):
        for imported in graph.find_modules_directly_imported_by(module):
            assert imported.startswith(f"{PACKAGE}.solvers") or imported.split(".")[0] in allowed, imported
