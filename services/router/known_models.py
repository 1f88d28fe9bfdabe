"""Every model that was ever offered here, and which of them a request means. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from headrace.errors import InvalidRequestError, NotFoundError, UnavailableError
from services.router.generation import EmbeddingOffer, ModelOffer
from services.router.limits import shown


class KnownModels:
    """Models by name. One that was ever offered stays known: its absence later is an outage, not the client's mistake."""

    def __init__(self, complete_ns: int) -> None:
        """`complete_ns` is when everybody has had time to offer what there is; before, what is not known may still come."""
        self._complete_ns = complete_ns
        self._offers: dict[str, ModelOffer] = {}

    def learn(self, offers: Iterable[ModelOffer]) -> None:
        """An instance offers these."""
        for offer in offers:
            # Not every stage knows of vectors; what one has told stays known.
            if offer.embedding is not None or offer.name not in self._offers:
                self._offers[offer.name] = offer

    def embedding_of(self, name: str) -> EmbeddingOffer | None:
        """What is known of a model's vectors."""
        offer = self._offers.get(name)
        return None if offer is None else offer.embedding

    def resolve(self, name: str, now_ns: int, *, embeds: bool | None = None) -> str:
        """The model that a request means; an empty name means the only one that can do what is asked.

        Args:
            name: As the client gave it.
            now_ns: Now.
            embeds: Whether vectors are asked for, or text; None for what any model can do.

        Raises:
            UnavailableError: No instance has offered any model yet; or not the one that is meant, and it may still come.
            NotFoundError: No instance ever offered this one.
            InvalidRequestError: No name is given and there are several, or the model cannot do what is asked.
        """
        known = sorted(self._offers)
        if not known:
            raise UnavailableError("no model is served yet: no tokenizer, scheduler or detokenizer has offered one")
        if embeds is None and not name and any(offer.embedding is None for offer in self._offers.values()):
            # Who names none means the model that generates.
            embeds = False
        able = [one for one in known if embeds is None or (self._offers[one].embedding is not None) == embeds]
        if name in able:
            return name
        if name and name not in self._offers:
            self._refuse(
                NotFoundError(f"the model {shown(name)} does not exist; served: {', '.join(known)}", param="model"), now_ns
            )
        if name or not able:
            what = "generates text and makes no vectors" if embeds else "makes vectors and generates no text"
            others = f"; those that do: {', '.join(able)}" if able else ""
            self._refuse(InvalidRequestError(f"the model {shown(name or known[0])} {what}{others}", param="model"), now_ns)
        if len(able) > 1:
            raise InvalidRequestError(f"model is required when several are served: {', '.join(able)}", param="model")
        return able[0]

    def _refuse(self, error: InvalidRequestError, now_ns: int) -> NoReturn:
        if now_ns < self._complete_ns:
            message = f"{error.message}. The router has just started, and more may register: retry (router.unknown_model_wait_s)"
            raise UnavailableError(message, param=error.param) from error
        raise error
