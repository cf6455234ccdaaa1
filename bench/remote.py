"""What a client of object storage costs: obstore, s3fs and boto3 against one moto server on this machine.

    python bench/remote.py [--rounds 5] [--json]

The clients take turns; medians over the rounds. Most of the time is the server's, which is slow; the
processor time is the client's own. Needs obstore, s3fs, boto3 and moto[server].
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

SMALL, LARGE, COUNT = os.urandom(2000), os.urandom(64 << 20), 300
PART = 16 << 20


def obstore_client(url):
    import obstore
    from obstore.store import S3Store

    store = S3Store("bench", endpoint=url, client_options={"allow_http": True})
    return {
        "put": lambda key, data: obstore.put(store, key, data, chunk_size=PART, max_concurrency=4),
        "create": lambda key, data: obstore.put(store, key, data, mode="create"),
        "get": lambda key: bytes(obstore.get(store, key).bytes()),
        "list": lambda prefix: sum(len(batch) for batch in obstore.list(store, prefix)),
    }


def s3fs_client(url):
    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=url, use_listings_cache=False, skip_instance_cache=True)
    return {
        "put": lambda key, data: files.pipe_file(f"bench/{key}", data, chunksize=PART),
        "create": lambda key, data: files.pipe_file(f"bench/{key}", data, mode="create"),
        "get": lambda key: files.cat_file(f"bench/{key}"),
        "list": lambda prefix: len(files.find(f"bench/{prefix}")),
    }


def boto3_client(url):
    import boto3

    s3 = boto3.client("s3", endpoint_url=url)
    pages = s3.get_paginator("list_objects_v2")
    return {
        "put": lambda key, data: s3.put_object(Bucket="bench", Key=key, Body=data),
        "create": lambda key, data: s3.put_object(Bucket="bench", Key=key, Body=data, IfNoneMatch="*"),
        "get": lambda key: s3.get_object(Bucket="bench", Key=key)["Body"].read(),
        "list": lambda prefix: sum(
            len(page.get("Contents", ())) for page in pages.paginate(Bucket="bench", Prefix=prefix)
        ),
    }


CLIENTS = {"obstore": obstore_client, "s3fs": s3fs_client, "boto3": boto3_client}


def timed(work):
    """Seconds of the clock, and of this process."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def one_round(client, mine):
    keys = [f"{mine}/small/{number:04}" for number in range(COUNT)]
    return {
        f"put {COUNT} x 2 kB": timed(lambda: [client["put"](key, SMALL) for key in keys]),
        f"get {COUNT} x 2 kB": timed(lambda: [client["get"](key) for key in keys]),
        f"create {COUNT} x 2 kB": timed(lambda: [client["create"](f"{key}-record", SMALL) for key in keys]),
        f"list {2 * COUNT}": timed(lambda: client["list"](f"{mine}/small")),
        "put 64 MiB": timed(lambda: client["put"](f"{mine}/large", LARGE)),
        "get 64 MiB": timed(lambda: client["get"](f"{mine}/large")),
    }


def measure(url, rounds):
    os.environ.update(
        AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_DEFAULT_REGION="us-east-1"
    )
    import boto3

    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="bench")
    clients = {name: make(url) for name, make in CLIENTS.items()}
    found = {name: [] for name in clients}
    for number in range(rounds):
        for name, client in clients.items():
            found[name].append(one_round(client, f"{name}-{number}"))
    return {
        name: {
            what: [round(statistics.median(one[what][part] for one in done), 3) for part in (0, 1)]
            for what in done[0]
        }
        for name, done in found.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "moto_server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(8)
        found = measure(f"http://127.0.0.1:{port}", options.rounds)
    finally:
        server.kill()
        server.wait()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{'seconds (processor)':22}" + "".join(f"{name:>18}" for name in found))
    for what in next(iter(found.values())):
        row = (f"{clock:8.2f} ({cpu:.2f})" for clock, cpu in (one[what] for one in found.values()))
        print(f"{what:22}" + "".join(f"{cell:>18}" for cell in row))


if __name__ == "__main__":
    main()
