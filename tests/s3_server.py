"""A real S3 server for tests: OpenStack Swift with its S3 API, one disk, one process, on 127.0.0.1.

    python s3_server.py FOLDER ACCESS_KEY SECRET_KEY     prints "READY <port>" when it serves

Swift's account, container and object servers and its proxy run as green threads on free ports of
loopback; rings, settings and objects live in FOLDER. ACCESS_KEY has the form account:user, as Swift's
test authentication wants it. The server ends when its standard input is closed, so that it never
outlives the tests that started it. Started by the `s3_server` fixture of conftest.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import eventlet

eventlet.monkey_patch(os=False)

import eventlet.hubs  # noqa: E402
import eventlet.wsgi  # noqa: E402
from swift.common import constraints, storage_policy, utils, wsgi  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402

BACKENDS = ("account", "container", "object")

SWIFT_CONF = """
[swift-hash]
swift_hash_path_prefix = scshards
swift_hash_path_suffix = tests
[storage-policy:0]
name = single
default = yes
[swift-constraints]
max_file_size = 5368709122
"""

BACKEND_CONF = """
[DEFAULT]
swift_dir = {etc}
devices = {disks}
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
log_level = ERROR
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

PROXY_CONF = """
[DEFAULT]
swift_dir = {etc}
log_level = ERROR
[pipeline:main]
pipeline = catch_errors gatekeeper listing_formats s3api tempauth bulk copy slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{user} = {secret} .admin
[filter:bulk]
use = egg:swift#bulk
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
"""


class Memory:
    """What Swift keeps in memcached, in a dict: tokens and cached container listings."""

    def __init__(self) -> None:
        self.items: dict = {}

    def get(self, key, raise_on_error=False):
        return self.items.get(key)

    def set(self, key, value, serialize=True, time=0, **_):
        self.items[key] = value

    def incr(self, key, delta=1, time=0):
        self.items[key] = self.items.get(key, 0) + delta
        return self.items[key]

    def decr(self, key, delta=1, time=0):
        return self.incr(key, -delta)

    def delete(self, key, server_key=None):
        self.items.pop(key, None)

    def set_multi(self, mapping, server_key, serialize=True, time=0, **_):
        self.items.update(mapping)

    def get_multi(self, keys, server_key):
        return [self.items.get(k) for k in keys]


def configure(folder: Path, ports: dict[str, int], access: str, secret: str) -> Path:
    """Write Swift's settings and rings; returns their folder."""
    etc, disks = folder / "etc", folder / "disks"
    etc.mkdir(parents=True, exist_ok=True)
    (disks / "d1").mkdir(parents=True, exist_ok=True)
    (etc / "swift.conf").write_text(SWIFT_CONF)
    for name, port in ports.items():
        (etc / f"{name}-server.conf").write_text(
            BACKEND_CONF.format(etc=etc, disks=disks, name=name)
        )
        ring = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
        device = {"id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "d1"}
        address = {"ip": "127.0.0.1", "port": port}
        replication = {"replication_ip": "127.0.0.1", "replication_port": port}
        ring.add_dev(device | address | replication)
        ring.rebalance()
        ring.get_ring().save(str(etc / f"{name}.ring.gz"))
    account, user = access.split(":")
    (etc / "proxy-server.conf").write_text(
        PROXY_CONF.format(etc=etc, account=account, user=user, secret=secret)
    )
    return etc


def serve(socket, app) -> None:
    eventlet.wsgi.server(
        socket,
        app,
        log=utils.NullLogger(),
        log_output=False,
        protocol=wsgi.SwiftHttpProtocol,
        custom_pool=eventlet.GreenPool(256),
        debug=False,
    )


def end_with_input() -> None:
    """End the process when whoever started it closes our standard input, or is gone."""
    while True:
        eventlet.hubs.trampoline(0, read=True)
        if not os.read(0, 1024):
            os._exit(0)


def main(folder: str, access: str, secret: str) -> None:
    sockets = {name: eventlet.listen(("127.0.0.1", 0)) for name in BACKENDS}
    ports = {name: s.getsockname()[1] for name, s in sockets.items()}
    etc = configure(Path(folder).absolute(), ports, access, secret)
    utils.set_swift_dir(str(etc))
    storage_policy.reload_storage_policies()
    constraints.reload_constraints()
    settings = {"log_statsd_host": ""}
    for name, socket in sockets.items():
        app = wsgi.loadapp(str(etc / f"{name}-server.conf"), global_conf=settings)
        eventlet.spawn(serve, socket, app)
    proxy = wsgi.loadapp(str(etc / "proxy-server.conf"), global_conf=settings)
    memory = Memory()

    def with_memory(environ, start_response):
        environ["swift.cache"] = memory
        return proxy(environ, start_response)

    eventlet.spawn(end_with_input)
    front = eventlet.listen(("127.0.0.1", 0))
    print(f"READY {front.getsockname()[1]}", flush=True)
    serve(front, with_memory)


if __name__ == "__main__":
    main(*sys.argv[1:])
