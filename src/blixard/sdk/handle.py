"""A handle to one submitted job."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from blixard.domain.payload import Encoding
from blixard.domain.state_machine import JobState
from blixard.protocol.jobs import JobDetail, JobResult, WhyView
from blixard.sdk.ends import fetch_result, inline_result
from blixard.sdk.patience import Deadline, Patience
from blixard.sdk.values import decode_result

if TYPE_CHECKING:
    from blixard.client.blocking import Client
    from blixard.client.contract import AsyncClient

R_co = TypeVar("R_co", covariant=True)


class JobHandle(Generic[R_co]):
    """Stands for a job that is stored durably; keep its ``id`` and get a handle again with ``App.handle(id)``."""

    def __init__(
        self,
        client: Client,
        job_id: str,
        encoding: Encoding = Encoding.JSON,
        patience: Patience | None = None,
    ) -> None:
        self.client = client
        self.patience = patience or Patience()
        self._encoding = encoding
        self._end: JobResult | None = None
        """How it ended, if ``as_completed`` has learnt it already."""
        self.id = job_id

    def __repr__(self) -> str:
        return f"<job {self.id}>"

    def result(self, timeout: float | None = None) -> R_co:
        """Wait for the end and return what the function returned.

        Raises ``JobFailed`` (with the remote traceback), ``JobTimedOut``, ``JobCancelled``, ``WorkerLost``, and ``WaitTimedOut``
        after ``timeout`` seconds; the job goes on then. Without a server, waiting is what makes the job run; a server that
        is restarted meanwhile is waited for, up to a minute.
        """
        if self._end is not None and self._end.result_blob is None:
            return self._value(inline_result(self._end))
        return self._value(self.client.call(lambda client: self._fetch(client, timeout)))

    async def result_async(self, timeout: float | None = None) -> R_co:  # noqa: ASYNC109 - the user's word
        """Do the same in an event loop, which stays free meanwhile."""
        if self._end is not None and self._end.result_blob is None:
            return self._value(inline_result(self._end))
        return self._value(await self.client.call_async(lambda client: self._fetch(client, timeout)))

    async def _fetch(self, client: AsyncClient, timeout: float | None) -> bytes | None:  # noqa: ASYNC109 - handed on
        insist, deadline = self.patience.insist, Deadline(timeout)
        end = self._end
        if end is None:
            end = await insist(lambda: client.result(self.id, timeout=deadline.left()), deadline)
        return await insist(partial(fetch_result, client, end))

    def _value(self, data: bytes | None) -> R_co:
        return cast("R_co", decode_result(self._encoding, data))

    def note_end(self, end: JobResult) -> None:
        """Be told how the job ended, so that ``result`` need not ask again."""
        self._end = end

    def detail(self) -> JobDetail:
        """Return everything about the job as it stands."""
        return self.client.job(self.id)

    def state(self) -> JobState:
        return self.detail().state

    def done(self) -> bool:
        """Say whether the job has ended, however."""
        return self.state().is_terminal

    def cancel(self) -> JobState:
        """Cancel it; returns its state. Raises ``InvalidTransition`` when it has ended otherwise."""
        return self.client.cancel(self.id).state

    def retry(self) -> JobState:
        """Run a failed or cancelled job again. Raises ``InvalidTransition`` for others."""
        self._end = None
        return self.client.retry(self.id).state

    def why(self) -> WhyView:
        """Say why it does not run, and what would unblock it."""
        return self.client.why(self.id)
