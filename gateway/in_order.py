"""A list whose items know their neighbours: one leaves from the middle, or goes to the end, without being looked for.

`OrderedDict` does the same with two lookups each time.
"""


class Item:
    """To inherit from: what stands in one `Order` at a time, or in none."""

    __slots__ = ("after", "before")

    def __init__(self) -> None:
        self.before: Item | None = None
        self.after: Item | None = None


class Order:
    """Items from `first` to `last`."""

    __slots__ = ("first", "last")

    def __init__(self) -> None:
        self.first: Item | None = None
        self.last: Item | None = None

    def append(self, item: Item) -> None:
        """One that stands nowhere becomes the last."""
        last = self.last
        item.before = last
        if last is None:
            self.first = item
        else:
            last.after = item
        self.last = item

    def remove(self, item: Item) -> None:
        """One that stands in this order leaves it."""
        before, after = item.before, item.after
        if before is None:
            self.first = after
        else:
            before.after = after
        if after is None:
            self.last = before
        else:
            after.before = before
        item.before = item.after = None

    def move_to_end(self, item: Item) -> None:
        """One that stands in this order becomes its last."""
        if self.last is not item:
            self.remove(item)
            self.append(item)
