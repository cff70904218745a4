"""What cannot be captured exactly, found and said: graph breaks, mutation, autocast, gradients that got lost."""

from autosp_aot.export.source import where  # noqa
import contextlib
@contextlib.contextmanager
def diagnosed():
    yield
def refuse_autocast(gm, target): pass
def refuse_mutation(ep): pass
def lost_gradients(*a): pass
