"""A pytest plugin: the first case of every test, then the second of every test, for a failure is all that is wanted."""

from collections import Counter


def pytest_collection_modifyitems(items):
    met = Counter()
    places = {}
    for item in items:
        met[item.originalname] += 1
        places[item] = met[item.originalname]
    items.sort(key=places.get)
