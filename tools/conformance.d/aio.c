/*
 * What ScyllaDB does to a filesystem: io_submit with O_DIRECT into ranges that fallocate has preallocated past the end of
 * the file, several appends in flight at once, fdatasync through the queue, and a truncation to the true size at the end.
 *
 *     aio DIRECTORY OPERATIONS SEED
 *
 * One thread. Keeps a copy of the file in memory and compares with it what direct and buffered reads give. Two requests
 * in flight never overlap, so there is one right answer. Says what differs and exits 1. System calls without libaio,
 * which is not installed everywhere.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/falloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BLOCK = 4096, BLOCKS = 4096, DEPTH = 32, LONGEST = 32, BATCH = 8, STEP = 1024 };

struct request {
    struct iocb iocb;
    char *buffer;
    size_t first, count; /* in blocks */
    int busy;
};

static char *model;             /* what the file must hold */
static char flying[BLOCKS];     /* blocks under a request that has not ended */
static size_t size, reserved;   /* of the file once all writes have ended, and how far it is preallocated, in blocks */
static size_t settled;          /* size by what has ended: a read past it may be short */
static struct request requests[DEPTH];
static int file, in_flight;
static aio_context_t queue;
static uint64_t state;

static void fail(const char *what, long value)
{
    printf("%s: %ld (%s)\n", what, value, value < 0 ? strerror(-value) : "");
    exit(1);
}

static void check(int failed, const char *what)
{
    if (failed) fail(what, -errno);
}

static uint64_t draw(uint64_t below)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % below;
}

static void *aligned(size_t length)
{
    void *memory;
    if (posix_memalign(&memory, BLOCK, length)) fail("posix_memalign", 0);
    memset(memory, 0, length);
    return memory;
}

static void compare(const char *found, size_t first, size_t bytes, const char *how)
{
    for (size_t i = 0; i < bytes; i++) {
        if (found[i] == model[first * BLOCK + i]) continue;
        printf("%s read: byte %zu is %02x and should be %02x\n", how, first * BLOCK + i, (unsigned char)found[i],
            (unsigned char)model[first * BLOCK + i]);
        exit(1);
    }
}

static void ended(struct request *request, long result)
{
    size_t length = request->count * BLOCK;
    request->busy = 0;
    in_flight--;
    memset(flying + request->first, 0, request->count);
    if (request->iocb.aio_lio_opcode == IOCB_CMD_FDSYNC) {
        if (result != 0) fail("fdatasync through the queue", result);
        return;
    }
    if (result != (long)length) fail(request->iocb.aio_lio_opcode == IOCB_CMD_PWRITE ? "write" : "read", result);
    if (request->iocb.aio_lio_opcode == IOCB_CMD_PREAD) compare(request->buffer, request->first, length, "queued");
    if (request->first + request->count > settled) settled = request->first + request->count;
}

static void collect(int at_least)
{
    struct io_event events[DEPTH];
    long n = syscall(SYS_io_getevents, queue, (long)at_least, (long)DEPTH, events, NULL);
    check(n < 0, "io_getevents");
    for (long i = 0; i < n; i++) ended((struct request *)(uintptr_t)events[i].data, events[i].res);
}

static void drain(void)
{
    while (in_flight) collect(1);
}

static int is_free(size_t first, size_t count)
{
    return memchr(flying + first, 1, count) == NULL;
}

static void prepare(struct request *request, int opcode, size_t first, size_t count)
{
    memset(&request->iocb, 0, sizeof request->iocb);
    request->iocb.aio_fildes = file;
    request->iocb.aio_lio_opcode = opcode;
    request->iocb.aio_data = (uintptr_t)request;
    request->iocb.aio_buf = count ? (uintptr_t)request->buffer : 0;
    request->iocb.aio_nbytes = count * BLOCK;
    request->iocb.aio_offset = first * BLOCK;
    request->first = first, request->count = count, request->busy = 1;
    memset(flying + first, 1, count);
    in_flight++;
}

/* Preallocates past the end, as commit logs do: with the size kept, with zeroes, or growing. */
static void reserve(void)
{
    static const int modes[] = { FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 0 };
    int mode = modes[draw(3)];
    check(fallocate(file, mode, (off_t)reserved * BLOCK, (off_t)STEP * BLOCK), "fallocate");
    reserved += STEP;
    if (!(mode & FALLOC_FL_KEEP_SIZE)) size = settled = reserved;
}

/* The next request, or none that would be free of overlap. */
static int fill(struct request *request)
{
    size_t count = 1 + draw(LONGEST), first;
    switch (draw(8)) {
    case 0: case 1: case 2: /* append; the one before it may still be in flight */
        first = size;
        if (first + count > reserved || !is_free(first, count)) return 0;
        break;
    case 3: case 4: /* anywhere in what is preallocated, leaving zeroes before it */
        first = draw(reserved - count);
        if (!is_free(first, count)) return 0;
        break;
    case 5: case 6:
        if (settled <= count) return 0;
        first = draw(settled - count);
        if (!is_free(first, count)) return 0;
        prepare(request, IOCB_CMD_PREAD, first, count);
        return 1;
    default:
        prepare(request, IOCB_CMD_FDSYNC, 0, 0);
        return 1;
    }
    for (size_t i = 0; i < count * BLOCK; i++) request->buffer[i] = (char)(draw(255) + 1);
    memcpy(model + first * BLOCK, request->buffer, count * BLOCK);
    if (first + count > size) size = first + count;
    prepare(request, IOCB_CMD_PWRITE, first, count);
    return 1;
}

static int submit(int most)
{
    struct iocb *batch[DEPTH];
    int n = 0, done = 0;
    for (int i = 0; i < DEPTH && n < most; i++)
        if (!requests[i].busy && fill(&requests[i])) batch[n++] = &requests[i].iocb;
    while (done < n) {
        long taken = syscall(SYS_io_submit, queue, (long)(n - done), batch + done);
        check(taken <= 0, "io_submit");
        done += taken;
    }
    return n;
}

/* Reads it all, through the page cache or around it. */
static void read_back(const char *path, int flags, const char *how, size_t bytes)
{
    char *found = aligned((size_t)BLOCKS * BLOCK);
    struct stat status;
    size_t have = 0;
    int again = open(path, O_RDONLY | flags);
    check(again < 0, "open");
    check(fstat(again, &status), "fstat");
    if ((size_t)status.st_size != bytes) fail("size", status.st_size);
    while (have < bytes) {
        ssize_t n = pread(again, found + have, (size_t)BLOCKS * BLOCK - have, have);
        check(n < 0, how);
        if (n == 0) fail("end of file too early, at", have);
        have += n;
    }
    if (have != bytes) fail("read past the end", have);
    compare(found, 0, bytes, how);
    close(again);
    free(found);
}

int main(int argc, char **argv)
{
    char path[4096];
    long operations, done = 0;
    if (argc != 4) fail("usage: aio DIRECTORY OPERATIONS SEED, arguments", argc - 1);
    operations = atol(argv[2]), state = (uint64_t)atol(argv[3]) * 0x9e3779b97f4a7c15u + 1;
    snprintf(path, sizeof path, "%s/commitlog.%s", argv[1], argv[3]);
    model = calloc(BLOCKS, BLOCK);
    for (int i = 0; i < DEPTH; i++) requests[i].buffer = aligned((size_t)LONGEST * BLOCK);
    check(syscall(SYS_io_setup, DEPTH, &queue) < 0, "io_setup");
    file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0644);
    check(file < 0, "open with O_DIRECT");
    while (done < operations) {
        size_t bytes;
        /* One life of a segment: filled to the end, or abandoned on the way, cut to what was used, read again. */
        memset(model, 0, (size_t)BLOCKS * BLOCK);
        check(ftruncate(file, 0), "ftruncate");
        size = settled = reserved = 0;
        reserve();
        for (long stop = done + 1 + draw(512); done < stop || size == 0;) {
            while (size + BATCH * LONGEST > reserved && reserved < BLOCKS) drain(), reserve();
            done += submit(1 + draw(BATCH));
            if (in_flight) collect(draw(2));
            if (size + LONGEST > BLOCKS) break;
        }
        drain();
        check(fdatasync(file), "fdatasync");
        bytes = size * BLOCK;
        read_back(path, O_DIRECT, "direct", bytes);
        bytes -= draw(BLOCK);
        check(ftruncate(file, bytes), "ftruncate");
        memset(model + bytes, 0, (size_t)BLOCKS * BLOCK - bytes);
        read_back(path, 0, "buffered", bytes);
        read_back(path, O_DIRECT, "direct", bytes);
    }
    printf("%ld operations\n", done);
    return 0;
}
