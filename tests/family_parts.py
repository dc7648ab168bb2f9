"""A pytest plugin that runs the tests of some families: `-p family_parts --part=0 --parts=4`.

Processes that share the kernels of a family would compile them once each. Families are dealt out by
how many tests they have; tests of no format are in part 0.
"""

from collections import Counter


def pytest_addoption(parser):
    parser.addoption("--part", type=int, default=0)
    parser.addoption("--parts", type=int, default=1)


def family(item):
    fmt = getattr(item, "callspec", None) and item.callspec.params.get("fmt")
    return type(fmt.codec).__module__ if fmt else ""


def pytest_collection_modifyitems(config, items):
    sizes = Counter(map(family, items))
    loads, parts = [sizes.pop("", 0)] + [0] * (config.getoption("parts") - 1), {"": 0}
    for name, size in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])):
        parts[name] = loads.index(min(loads))
        loads[parts[name]] += size
    items[:] = [item for item in items if parts[family(item)] == config.getoption("part")]
