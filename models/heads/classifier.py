"""The base class of the classifiers."""

from torch import nn

from tailtune.configs.option import NoOptions


class Classifier(nn.Module):
    """Base of all heads, which are made by (D, C) and the fields of their options."""

    Options: type = NoOptions
