"""The routes of `moebeam serve`, without a queue behind them: nothing is run here."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from moebeam.jobs.serve.app import BatchServer, ServerSettings
from moebeam.jobs.serve.keys import Keys, add_key
from moebeam.jobs.serve.shelf import Shelf
from moebeam.jobs.serve.upload import UploadLimits

LINES = b'{"custom_id": "a"}\n\n{"custom_id": "b"}'

MakeClient = Callable[..., TestClient]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "server"


def open_client(folder: Path, keys: str | None = None, **settings: Any) -> TestClient:
    server = BatchServer(Shelf.open(folder), ServerSettings(job="job.toml", keys=Keys(keys), **settings))
    return TestClient(server.make_app(), raise_server_exceptions=False)


def upload(client: TestClient, content: bytes = LINES, **more: Any) -> Any:
    fields = {"purpose": "batch", **more.pop("data", {})}
    return client.post("/v1/files", files={"file": ("in.jsonl", content)}, data=fields, **more)


def create(client: TestClient, file_id: str, **more: Any) -> Any:
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    headers = more.pop("headers", None)
    return client.post("/v1/batches", json={**body, **more}, headers=headers)


def test_a_file_comes_back_as_it_was_uploaded_and_survives_a_restart(folder: Path) -> None:
    file = upload(open_client(folder)).json()
    again = open_client(folder)
    assert (file["bytes"], file["purpose"], file["status"]) == (len(LINES), "batch", "processed")
    assert again.get(f"/v1/files/{file['id']}").json() == file
    assert again.get(f"/v1/files/{file['id']}/content").content == LINES
    assert again.delete(f"/v1/files/{file['id']}").json()["deleted"] is True
    assert again.get(f"/v1/files/{file['id']}").status_code == 404
    assert not list(folder.rglob("file-*"))


def test_what_an_upload_left_that_was_cut_off_is_removed_at_the_next_start(folder: Path) -> None:
    upload(open_client(folder))
    files = folder / "tenants/local/files"
    (files / "file-1.jsonl").write_bytes(b"content without a record")
    (files / ".file-2.part").write_bytes(b"half")
    assert len(open_client(folder).get("/v1/files").json()["data"]) == 1
    assert sorted(path.suffix for path in files.iterdir()) == [".json", ".jsonl"]


@pytest.mark.parametrize(
    ("content", "data", "status", "words"),
    [
        (b"x" * 101, {}, 413, "at most 100 bytes"),
        (b"x" * 70_000, {}, 413, "at most 100 bytes"),
        (b"1\n2\n3\n4", {}, 400, "at most 3 lines"),
        (b"1", {"purpose": "fine-tune"}, 400, "expected 'batch', found 'fine-tune'"),
        (b"1", {"expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}, 400, "seconds"),
    ],
)
def test_an_upload_that_is_not_as_expected_leaves_nothing(
    folder: Path, content: bytes, data: dict[str, str], status: int, words: str
) -> None:
    client = open_client(folder, limits=UploadLimits(max_bytes=100, max_lines=3))
    answer = upload(client, content, data=data)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True)
    assert not [path for path in folder.rglob("*file*") if path.is_file()]


def test_a_form_without_a_file_is_named(folder: Path) -> None:
    answer = open_client(folder).post("/v1/files", data={"purpose": "batch"}, files={"other": b""})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
    assert open_client(folder).post("/v1/files", content=b"{}").status_code == 400


def test_a_batch_counts_the_lines_of_its_input_and_waits(folder: Path) -> None:
    client = open_client(folder)
    file = upload(client).json()
    batch = create(client, file["id"], metadata={"team": "x"}).json()
    assert (batch["status"], batch["request_counts"]["total"], batch["metadata"]) == ("validating", 2, {"team": "x"})
    assert batch["expires_at"] - batch["created_at"] == 86_400
    assert open_client(folder).get(f"/v1/batches/{batch['id']}").json() == batch
    assert client.delete(f"/v1/files/{file['id']}").status_code == 409
    assert client.post(f"/v1/batches/{batch['id']}/cancel").json()["status"] == "cancelling"


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_by_the_field(folder: Path, changed: dict[str, Any], param: str) -> None:
    client = open_client(folder)
    answer = create(client, upload(client).json()["id"], **changed)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].partition(".")[0] == param
    assert client.get("/v1/batches").json()["data"] == []


def test_a_request_that_is_repeated_makes_nothing_twice(folder: Path) -> None:
    client = open_client(folder)
    retry = {"x-stainless-retry-count": "1"}
    first = upload(client).json()
    assert upload(client, headers=retry).json() == first
    assert upload(client).json()["id"] != first["id"]
    named = {"Idempotency-Key": "k1"}
    batch = create(client, first["id"], headers=named).json()
    assert create(open_client(folder), first["id"], headers=named).json() == batch
    assert create(client, first["id"], completion_window="1h", headers=named).status_code == 409
    plain = create(client, first["id"]).json()
    assert create(client, first["id"], headers=retry).json() == plain
    assert len(client.get("/v1/batches").json()["data"]) == 2


def test_tenants_see_nothing_of_each_other_and_strangers_nothing_at_all(folder: Path, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys.json")
    ours, theirs = ({"Authorization": f"Bearer {add_key(keys, tenant)}"} for tenant in ("acme", "globex"))
    client = open_client(folder, keys)
    file = upload(client, headers=ours).json()
    batch = create(client, file["id"], headers=ours).json()
    for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content", f"/v1/batches/{batch['id']}"):
        assert client.get(path, headers=ours).status_code == 200
        assert client.get(path, headers=theirs).status_code == 404
        for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": ours["Authorization"][7:]}):
            assert client.get(path, headers=headers).json()["error"]["code"] == "invalid_api_key"
    assert create(client, file["id"], headers=theirs).status_code == 400
    assert client.post(f"/v1/batches/{batch['id']}/cancel", headers=theirs).status_code == 404
    assert client.delete(f"/v1/files/{file['id']}", headers=theirs).status_code == 404
    assert client.get("/v1/files", headers=theirs).json()["data"] == []
    assert client.get("/v1/batches", headers=theirs).json()["data"] == []
    assert "acme" not in client.get("/metrics").text
    kept = Path(keys).read_text()
    assert not any(headers["Authorization"][7:] in kept for headers in (ours, theirs))


def test_a_key_that_is_added_is_known_without_a_restart(folder: Path, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys.json")
    add_key(keys, "acme")
    client = open_client(folder, keys)
    later = add_key(keys, "acme")
    assert client.get("/v1/files", headers={"Authorization": f"Bearer {later}"}).status_code == 200


def test_a_page_of_another_name_cannot_reach_a_server_without_keys(folder: Path) -> None:
    assert open_client(folder).get("/v1/files", headers={"Host": "evil.example"}).status_code == 400


def test_lists_are_cut_into_pages_from_the_latest_on(folder: Path) -> None:
    client = open_client(folder)
    ids = [upload(client, json.dumps({"custom_id": str(number)}).encode()).json()["id"] for number in range(5)]
    first = client.get("/v1/files", params={"limit": 2}).json()
    rest = client.get("/v1/files", params={"limit": 9, "after": first["last_id"]}).json()
    assert [file["id"] for file in first["data"] + rest["data"]] == ids[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    for params in ({"limit": 0}, {"limit": "x"}, {"after": "file-none"}, {"order": "up"}):
        assert client.get("/v1/files", params=params).status_code == 400


def test_a_tenant_may_have_so_many_batches_at_once(folder: Path) -> None:
    client = open_client(folder, max_waiting=1)
    file = upload(client).json()
    assert create(client, file["id"]).status_code == 200
    assert create(client, file["id"]).status_code == 429


def test_of_changes_that_overlap_the_last_one_is_on_disk(folder: Path) -> None:
    client = open_client(folder)
    batch_id = create(client, upload(client).json()["id"]).json()["id"]
    shelf = Shelf.open(folder)

    async def change() -> None:
        await asyncio.gather(
            *(shelf.put_batch(replace(shelf.batches[batch_id], num_completed=number)) for number in range(20))
        )

    asyncio.run(change())
    assert Shelf.open(folder).batches[batch_id].num_completed == 19
