"""The one error that a conversion reports to its user, a check that many options need, and others' errors in a line."""


class ConversionError(ValueError):
    """The conversion cannot be done as asked. The message says what was found, what was wanted and what to do."""


def check_whole_number(field: str, value: object, least: int) -> None:
    """Raise `ConversionError` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConversionError(f"{field}={value!r} is not a whole number of at least {least}.")


def check_seed(seed: object, bits: int = 64) -> None:
    """Raise `ConversionError` unless `seed` is an integer from 0 that fits into so many bits."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**bits:
        raise ConversionError(f"seed={seed!r} is not a whole number from 0 to {2**bits - 1}.")


def one_line(error: BaseException | str) -> str:
    """What an error says, as a part of a sentence."""
    return " ".join(str(error).split())[:500]
