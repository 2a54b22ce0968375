"""Experts at the side of a model that writes calls: what it asks for is done while it goes on."""

from umm_jax.conversation import ImageData
from umm_jax.families.contract import Replier
from umm_jax.markup.plan import Source
from umm_jax.router.execute import Done, Executor
from umm_jax.router.experts import Medium


class Attending:
    """Does the calls of replies that give pictures, with an executor's experts.

    Attributes:
        done: what became of each call, in the order they were asked.
    """

    def __init__(self, executor: Executor):
        self.executor = executor
        self.done: list[Done] = []

    def __call__(self, asked) -> ImageData | None:
        """The picture a call asks for, or None where nobody can make it.

        Args:
            asked: an ``Asked`` of the family.
        """
        step, media, region = asked.step._replace(index=0, takes=None), [], None
        if asked.source is not None:
            media = [Medium("image", asked.source.array())]
            step = step._replace(takes=Source("user", 0))
        for mask in asked.masks:
            region = mask.array() if region is None else region | mask.array()
        seed = asked.seed * 1009 + asked.step.index
        (done,) = self.executor.run([step], media, seed, regions={} if region is None else {0: region})
        self.done.append(done)
        return ImageData.from_array(done.media[-1].value) if done.media else None


def attend(replier: Replier, executor: Executor) -> Attending | None:
    """Puts experts at a replier's side; None where it is of a family that draws by itself."""
    if not hasattr(replier, "experts"):
        return None
    replier.experts = attending = Attending(executor)
    return attending
