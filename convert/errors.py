"""The one error that a conversion reports to its user."""


class ConversionError(ValueError):
    """The conversion cannot be done as asked. The message says what was found, what was wanted and what to do."""
