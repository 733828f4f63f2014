"""What interrupted puts leave in S3: parts of uploads that were never completed, unseen and paid for.

obstore 0.12 cannot list them, so these two requests are signed here (AWS Signature Version 4), with the access key of
the environment. Where credentials come by another way (an instance's role), or on GCS, the bucket's own lifecycle rule
does it; Azure drops uncommitted blocks by itself.
"""

import hashlib
import hmac
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit

TIMEOUT_S = 30.0
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Interrupted uploads under one prefix of one bucket."""

    endpoint: str
    bucket: str
    prefix: str
    region: str
    key_id: str
    secret: str
    token: str | None

    @classmethod
    def of(cls, url: str, environment: Mapping[str, str] = os.environ) -> Self | None:
        """For `s3://bucket/prefix`; None for other stores, and without an access key in the environment."""
        parts = urlsplit(url)
        key_id, secret = (environment.get(f"AWS_{name}") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))
        if parts.scheme not in ("s3", "s3a") or not key_id or not secret:
            return None
        region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
        return cls(
            endpoint=environment.get("AWS_ENDPOINT_URL")
            or environment.get("AWS_ENDPOINT")
            or f"https://s3.{region}.amazonaws.com",
            bucket=parts.netloc,
            prefix=parts.path.strip("/"),
            region=region,
            key_id=key_id,
            secret=secret,
            token=environment.get("AWS_SESSION_TOKEN"),
        )

    def sweep(self, before: float) -> int:
        """Ends uploads begun before that time, in seconds since 1970; how many. Raises OSError."""
        stale = [(key, upload) for key, upload, begun_at in self._uploads() if begun_at < before]
        for key, upload in stale:
            self._end(key, upload)
        return len(stale)

    def _uploads(self) -> Iterator[tuple[str, str, float]]:
        """(key, upload's id, when it was begun)"""
        from xml.etree import ElementTree  # half a MiB, for what is done once an hour

        prefix = f"{self.prefix}/" if self.prefix else ""
        markers: dict[str, str] = {}
        while True:
            page = ElementTree.fromstring(self._ask("GET", "", {"uploads": "", "prefix": prefix, **markers}))  # noqa: S314  the operator's own store
            for upload in page.iterfind("{*}Upload"):
                begun_at = datetime.fromisoformat(upload.findtext("{*}Initiated", "")).timestamp()
                yield upload.findtext("{*}Key", ""), upload.findtext("{*}UploadId", ""), begun_at
            if page.findtext("{*}IsTruncated") != "true":
                return
            markers = {
                "key-marker": page.findtext("{*}NextKeyMarker", ""),
                "upload-id-marker": page.findtext("{*}NextUploadIdMarker", ""),
            }

    def _end(self, key: str, upload: str) -> None:
        try:
            self._ask("DELETE", key, {"uploadId": upload})
        except HTTPError as error:
            if error.code != 404:  # it was completed meanwhile, or another gateway was faster
                raise

    def _ask(self, method: str, key: str, query: Mapping[str, str]) -> bytes:
        from urllib.request import Request, urlopen

        base = urlsplit(self.endpoint)
        path = quote(f"{base.path.rstrip('/')}/{self.bucket}" + (f"/{key}" if key else ""), safe="/-_.~")
        asked = urlencode(sorted(query.items()), quote_via=quote, safe="-_.~")
        headers = self._signed(method, base.netloc, path, asked, datetime.now(UTC))
        url = f"{base.scheme}://{base.netloc}{path}?{asked}"
        request = Request(url, method=method, headers=headers)  # noqa: S310  the operator's own URL
        with urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            content: bytes = answer.read()
        return content

    def _signed(self, method: str, host: str, path: str, query: str, now: datetime) -> dict[str, str]:
        """The headers of a request without a body."""
        moment, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
        headers = {"host": host, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": moment}
        if self.token:
            headers["x-amz-security-token"] = self.token
        names = ";".join(sorted(headers))
        lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        asked = "\n".join((method, path, query, lines, names, EMPTY_SHA256))
        scope = f"{day}/{self.region}/s3/aws4_request"
        text = "\n".join(("AWS4-HMAC-SHA256", moment, scope, hashlib.sha256(asked.encode()).hexdigest()))
        key = f"AWS4{self.secret}".encode()
        for part in (day, self.region, "s3", "aws4_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
        credential = f"Credential={self.key_id}/{scope}"
        headers["authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
        return headers
