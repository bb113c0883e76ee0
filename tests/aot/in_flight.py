"""Of the collectives that `programs.collectives` lists, those that move beside computation."""


def beside(collectives):
    return [each for each in collectives if each["beside"]]


def num_bytes(collectives):
    return sum(each["bytes"] for each in collectives)
