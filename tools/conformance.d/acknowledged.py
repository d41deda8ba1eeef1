#!/usr/bin/env python3
"""Kills clients and servers with -9 under load and checks that what was acknowledged is there.

    acknowledged.py redis   DIRECTORY SCRATCH ROUNDS SECONDS    the server, appendonly with an fsync for each write
    acknowledged.py rocksdb DIRECTORY SCRATCH ROUNDS SECONDS    the process that has the database open
    acknowledged.py sqlite  DIRECTORY SCRATCH ROUNDS SECONDS    three writers, in each journal mode
    acknowledged.py daemon  DIRECTORY SCRATCH BACKING PID SECONDS   the filesystem's daemon, below many clients

DIRECTORY is on the filesystem under test, SCRATCH is not. Each writer counts in SCRATCH what has been acknowledged, so
that the count survives it. The processes started here are killed on every way out. Exit 1 says what was lost.
"""

import ctypes
import errno
import mmap
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time

RECORD = 64
BLOCK = 4096
# What a client of a dead daemon may be told.
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)


def expect(truth, what):
    if not truth:
        sys.exit(what)


class Count:
    """A number that a killed process leaves behind: a page of a file outside. It is stored by one instruction:
    struct.pack_into would first write zeros, and a kill between the two leaves 0."""

    def __init__(self, path):
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self.file, mmap.PAGESIZE)
        self.cell = ctypes.c_uint64.from_buffer(mmap.mmap(self.file, mmap.PAGESIZE))

    def get(self):
        return self.cell.value

    def set(self, value):
        self.cell.value = value


def again(*words):
    """This program as another process, in our group, so that a time limit ends it too."""
    return subprocess.Popen([sys.executable, __file__, *map(str, words)])


def killed(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


# Redis


class Redis:
    """One connection: a command, and its answer as the server's bytes."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.lines = self.socket.makefile("rb")

    def ask(self, *words):
        parts = [b"*%d\r\n" % len(words)]
        for word in words:
            word = str(word).encode()
            parts.append(b"$%d\r\n%s\r\n" % (len(word), word))
        self.socket.sendall(b"".join(parts))
        answer = self.lines.readline()
        if not answer.endswith(b"\r\n"):
            raise ConnectionError("the server has gone")
        if answer[:1] == b"$" and answer != b"$-1\r\n":
            return self.lines.read(int(answer[1:]) + 2)[:-2]
        return answer[:-2]


def redis_server(directory, scratch):
    path = f"{scratch}/redis.sock"
    if os.path.exists(path):
        os.unlink(path)
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", path, "--dir", directory, "--appendonly", "yes", "--appendfsync"]
        + ["always", "--save", "", "--logfile", f"{scratch}/redis.log", "--auto-aof-rewrite-min-size", "64kb"]
    )
    for _ in range(600):
        try:
            if Redis(path).ask("PING") == b"+PONG":
                return server, path
        except OSError:
            pass
        if server.poll() is not None:
            break
        time.sleep(0.1)
    killed([server])
    sys.exit("Redis does not start: " + open(f"{scratch}/redis.log").read()[-2000:])


def redis_writer(path, number, acknowledged):
    try:
        connection = Redis(path)
        while connection.ask("SET", f"{number}:{acknowledged[number]}", acknowledged[number]) == b"+OK":
            acknowledged[number] += 1
    except OSError:
        pass


def redis(directory, scratch, rounds, seconds):
    acknowledged = [0] * 8
    for turn in range(rounds):
        server, path = redis_server(directory, scratch)
        try:
            for number, count in enumerate(acknowledged):
                connection = Redis(path)
                for i in range(count):
                    found = connection.ask("GET", f"{number}:{i}")
                    expect(found == str(i).encode(), f"round {turn}: {number}:{i} is {found!r} after the restart")
            writers = [threading.Thread(target=redis_writer, args=(path, n, acknowledged)) for n in range(8)]
            for writer in writers:
                writer.start()
            time.sleep(seconds * random.uniform(0.5, 1))
            Redis(path).ask("BGREWRITEAOF")
            time.sleep(random.uniform(0, 0.3))
        finally:
            killed([server])
        for writer in writers:
            writer.join()
    server, path = redis_server(directory, scratch)
    keys = int(Redis(path).ask("DBSIZE")[1:])
    killed([server])
    expect(keys >= sum(acknowledged), f"{sum(acknowledged)} writes were acknowledged, {keys} are there")
    print(f"{sum(acknowledged)} acknowledged writes, {rounds} kills")


# RocksDB: a write that was acknowledged is in the log file; a killed process takes nothing with it.


def ldb(directory, *words):
    done = subprocess.run(["ldb", f"--db={directory}", *words], capture_output=True, text=True, errors="replace")
    expect(done.returncode == 0 and "Failed" not in done.stdout, f"ldb {words}: {done.stdout[-500:]} {done.stderr[-500:]}")
    return done.stdout


def rocksdb(directory, scratch, rounds, seconds):
    database = f"{directory}/rocksdb"
    ldb(database, "--create_if_missing", "put", "first", "put")
    acknowledged = 0
    for turn in range(rounds):
        shell = subprocess.Popen(
            ["stdbuf", "-oL", "ldb", f"--db={database}", "--write_buffer_size=1048576", "query"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
        )  # fmt: skip
        killer = threading.Timer(seconds * random.uniform(0.5, 1), shell.kill)
        begun = False
        try:
            while True:
                shell.stdin.write(f"put {acknowledged:09} {acknowledged:0200}\n")
                if not shell.stdout.readline().startswith("Successfully put"):
                    break
                acknowledged += 1
                # Only now has it opened the database.
                if not begun:
                    killer.start()
                    begun = True
        except BrokenPipeError:
            pass
        killer.cancel()
        killed([shell])
        there = dict(line.split(" : ") for line in ldb(database, "scan").splitlines() if " : " in line)
        for i in range(acknowledged):
            expect(there.get(f"{i:09}") == f"{i:0200}", f"round {turn}: key {i} of {acknowledged} is lost")
        ldb(database, "checkconsistency")
    expect(acknowledged > 0, "nothing was written")
    print(f"{acknowledged} acknowledged writes, {rounds} kills")


# SQLite


def sqlite_open(database, mode):
    connection = sqlite3.connect(database, timeout=60, isolation_level=None)
    connection.execute(f"PRAGMA journal_mode={mode}")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA wal_autocheckpoint=100")
    return connection


def sqlite_writer(database, mode, number, scratch):
    count = Count(f"{scratch}/sqlite.{mode}.{number}")
    connection = sqlite_open(database, mode)
    while True:
        n = count.get() + 1
        connection.execute("BEGIN IMMEDIATE")
        # One that was committed and not counted any more is written again.
        connection.execute(
            "INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", (number, n, os.urandom(random.randrange(1, 9000)))
        )
        connection.execute("UPDATE totals SET n = ? WHERE writer = ?", (n, number))
        connection.execute("COMMIT")
        count.set(n)


def sqlite(directory, scratch, rounds, seconds):
    said = []
    for mode in ("wal", "delete", "truncate", "persist"):
        database = f"{directory}/sqlite.{mode}"
        connection = sqlite_open(database, mode)
        connection.execute("CREATE TABLE rows (writer INTEGER, n INTEGER, data BLOB, PRIMARY KEY (writer, n))")
        connection.execute("CREATE TABLE totals (writer INTEGER PRIMARY KEY, n INTEGER)")
        connection.executemany("INSERT INTO totals VALUES (?, 0)", ((n,) for n in range(3)))
        connection.close()
        for turn in range(rounds):
            writers = [again("sqlite-writer", database, mode, n, scratch) for n in range(3)]
            time.sleep(seconds * random.uniform(0.5, 1))
            alive = [writer.poll() is None for writer in writers]
            killed(writers)
            expect(all(alive), f"{mode}, round {turn}: a writer has ended by itself")
            connection = sqlite_open(database, mode)
            found = connection.execute("PRAGMA integrity_check").fetchall()
            expect(found == [("ok",)], f"{mode}, round {turn}: {found}")
            for n in range(3):
                count = Count(f"{scratch}/sqlite.{mode}.{n}").get()
                rows, last = connection.execute("SELECT count(*), max(n) FROM rows WHERE writer = ?", (n,)).fetchone()
                total = connection.execute("SELECT n FROM totals WHERE writer = ?", (n,)).fetchone()[0]
                expect(
                    rows == (last or 0) == total and count <= rows <= count + 1,
                    f"{mode}, round {turn}: {count} acknowledged, {rows} rows up to {last}, total {total}",
                )
            connection.close()
        said.append(f"{mode} {sum(Count(f'{scratch}/sqlite.{mode}.{n}').get() for n in range(3))}")
    print(f"acknowledged commits: {', '.join(said)}; {rounds} kills each")


# Clients of the filesystem whose daemon is killed. Each does one thing until it is told that the daemon has gone; the
# number of the last operation that was acknowledged is in its count, and record() says what that operation has written.


def record(n, length):
    return b"%0*d" % (length, n)


def client(kind, directory, scratch):
    count = Count(f"{scratch}/{kind}")
    step = globals()[f"client_{kind}"](f"{directory}/{kind}")
    while True:
        try:
            step(count.get())
        except OSError as error:
            expect(error.errno in GONE, f"{kind}: {error}")
            return
        count.set(count.get() + 1)


def appending(flags, after=lambda file: None):
    def make(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | flags, 0o644)

        def step(n):
            os.write(file, record(n, RECORD))
            after(file)

        return step

    return make


client_append = appending(0)
client_fsync = appending(0, os.fsync)
client_osync = appending(os.O_SYNC)


def client_direct(path):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
    page = mmap.mmap(-1, BLOCK)

    def step(n):
        page[:] = record(n, BLOCK)
        os.pwrite(file, page, n * BLOCK)

    return step


def client_mapped(path):
    """Acknowledged is what msync has; a store into a page that has gone ends us, as it may."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(file, 256 * BLOCK)
    view = mmap.mmap(file, 256 * BLOCK)

    def step(n):
        at = n % 256 * BLOCK
        view[at : at + RECORD] = record(n, RECORD)
        view.flush(at, BLOCK)

    return step


def client_names(path):
    os.mkdir(path)

    def step(n):
        os.close(os.open(f"{path}/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        os.rename(f"{path}/new", f"{path}/{n}")
        if n >= 1000:
            os.unlink(f"{path}/{n - 1000}")

    return step


def client_reading(path):
    def step(n):
        parent = os.path.dirname(path)
        for name in os.listdir(parent):
            os.stat(f"{parent}/{name}")
        with open(f"{parent}/append", "rb") as file:
            file.read()

    return step


def client_locking(path):
    def step(n):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.lockf(file, os.F_LOCK, 0)
            os.lockf(file, os.F_ULOCK, 0)
        finally:
            os.close(file)

    return step


def client_waiting(path):
    """The other one at the same lock."""
    return client_locking(os.path.dirname(path) + "/locking")


KINDS = ("append", "fsync", "osync", "direct", "mapped", "names", "reading", "locking", "waiting")


def contents(path):
    with open(path, "rb") as file:
        return file.read()


def check_backing(backing, count):
    for kind in ("append", "fsync", "osync"):
        found = contents(f"{backing}/{kind}")
        for n in range(count[kind]):
            expect(found[n * RECORD : (n + 1) * RECORD] == record(n, RECORD), f"{kind}: record {n} of {count[kind]} is lost")
    found = contents(f"{backing}/direct")
    for n in range(count["direct"]):
        expect(found[n * BLOCK : (n + 1) * BLOCK] == record(n, BLOCK), f"direct: block {n} of {count['direct']} is lost")
    found = contents(f"{backing}/mapped")
    for n in range(max(0, count["mapped"] - 256), count["mapped"]):
        at = n % 256 * BLOCK
        # The store after the last one that was acknowledged may be there already.
        expect(int(found[at : at + RECORD]) in (n, n + 256), f"mapped: page {n} of {count['mapped']} is lost")
    names = set(os.listdir(f"{backing}/names"))
    for n in range(max(0, count["names"] - 1000), count["names"]):
        # The oldest may be removed already.
        expect(str(n) in names or n == count["names"] - 1000, f"names: {n} of {count['names']} is lost")


def daemon(directory, scratch, backing, pid, seconds):
    # The reader wants it from its first step on.
    open(f"{directory}/append", "wb").close()
    clients = {kind: again("client", kind, directory, scratch) for kind in KINDS}
    counts = {kind: Count(f"{scratch}/{kind}") for kind in KINDS}
    try:
        end = time.monotonic() + 30
        while any(count.get() == 0 for count in counts.values()) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(seconds)
        for kind, process in clients.items():
            expect(process.poll() is None, f"{kind} has ended before the daemon")
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 10
        for kind, process in clients.items():
            try:
                status = process.wait(max(0.01, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                sys.exit(f"{kind} hangs ten seconds after the daemon was killed")
            may = (0, -signal.SIGBUS) if kind == "mapped" else (0,)
            expect(status in may, f"{kind} ended with {status}")
    finally:
        killed(clients.values())
    for use in (os.listdir, os.stat, lambda path: os.open(f"{path}/append", os.O_RDONLY), os.statvfs):
        try:
            use(directory)
            sys.exit(f"{directory} answers, and its daemon is dead")
        except OSError as error:
            expect(error.errno == errno.ENOTCONN, f"the mountpoint says {error}, and not ENOTCONN")
    count = {kind: count.get() for kind, count in counts.items()}
    for kind in KINDS:
        expect(count[kind] > 0, f"{kind} has done nothing")
    check_backing(backing, count)
    print("acknowledged: " + ", ".join(f"{kind} {count[kind]}" for kind in KINDS))


def main():
    job, *words = sys.argv[1:]
    jobs = {"redis": redis, "rocksdb": rocksdb, "sqlite": sqlite, "daemon": daemon}
    jobs |= {"sqlite-writer": sqlite_writer, "client": client}
    jobs[job](*(float(word) if re.fullmatch(r"\d+\.\d+", word) else int(word) if word.isdigit() else word for word in words))


if __name__ == "__main__":
    main()
