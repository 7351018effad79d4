"""Which decoded frames are not as they were made: themselves damaged, or built on a frame that is, or that is lost."""


class Damage:
    """Follows damage through a stream whose packets are numbered as they lie in the file.

    A frame may be built on any before it in the file, back to the last key frame. Frames that are shown before a key
    frame but lie behind it may be built on those before that, too.
    """

    def __init__(self) -> None:
        self._since: int | None = None  # the first damaged packet
        self._latest = 0  # and the last one
        self._told = False  # a frame that was not intact was shown since
        self._begun = False  # any frame was shown

    def at(self, number: int) -> None:
        """The packet of that number does not decode."""
        self._since = number if self._since is None else min(self._since, number)
        self._latest = max(self._latest, number)

    def passes(self, number: int, is_key: bool, is_corrupt: bool) -> bool:
        """Whether the next frame in order of display, made of packet `number`, is intact.

        A key frame behind the damage ends it. Where no frame told of the damage, since those that it hit did not come
        out at all, that key frame is said not to be intact, so that no clip spans the gap.
        """
        if is_corrupt:
            self.at(number)
        if self._since is None:
            intact = True
        elif is_key and number > self._latest:
            intact = self._told or not self._begun
            self._since, self._latest, self._told = None, 0, False
        else:
            intact = number < self._since
            self._told |= not intact
        self._begun = True
        return intact
