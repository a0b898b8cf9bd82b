/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A VMM that was built against the first version of memd.h, of which it holds a copy: it works with
 * today's library. And one of a version to come, with larger structs.
 *
 * NEVER CHANGE the structs below: they are what old binaries have. Prints one line; 77: skipped.
 */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct memd_vm;

struct first_ops {
    size_t size;
    int (*pause)(void *opaque);
    int (*resume)(void *opaque);
    int (*pinned)(void *opaque, const void *addr, size_t bytes);
};

struct first_options {
    size_t size;
    const char *socket;
    const char *token;
    const char *vmm;
    const struct first_ops *ops;
    void *opaque;
};

struct first_status {
    size_t size;
    uint64_t pages;
    uint64_t shared;
    uint64_t zero;
    uint64_t merges;
    uint64_t unmerges;
    uint64_t zero_merges;
    uint64_t captives;
    uint32_t connected;
    uint32_t passes;
};

_Static_assert(sizeof(struct first_ops) == 32 && sizeof(struct first_options) == 48 &&
                   sizeof(struct first_status) == 72,
               "the sizes of the first version on LP64");

int memd_attach(const void *options, struct memd_vm **ret_vm);
int memd_ram_add(struct memd_vm *vm, void *addr, size_t bytes, unsigned flags);
int memd_ram_remove(struct memd_vm *vm, void *addr, size_t bytes);
int memd_ram_discard(struct memd_vm *vm, void *addr, size_t bytes);
int memd_get_status(struct memd_vm *vm, void *ret_status);
int memd_detach(struct memd_vm *vm);

#define FIRST_FRESH 1U
#define RAM_BYTES   (4UL << 20)

#define REQUIRE(condition)                                         \
    do {                                                           \
        if (!(condition)) {                                        \
            printf("line %d: not so: %s\n", __LINE__, #condition); \
            exit(1);                                               \
        }                                                          \
    } while (0)

static int on_pause(void *opaque)
{
    (void)opaque;
    return 0;
}

static int on_pinned(void *opaque, const void *addr, size_t bytes)
{
    (void)opaque;
    (void)addr;
    (void)bytes;
    return 0;
}

static const struct first_ops first_ops = {sizeof(first_ops), on_pause, on_pause, on_pinned};

/* What the first version could do. The status is followed by bytes that are not its own. */
static void use(struct memd_vm *vm)
{
    struct {
        struct first_status status;
        uint64_t not_ours;
    } answer = {{.size = sizeof(struct first_status)}, 0x1122334455667788};
    uint8_t *ram =
        mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    REQUIRE(ram != MAP_FAILED);
    REQUIRE(memd_ram_add(vm, ram, RAM_BYTES, FIRST_FRESH) == 0);
    memset(ram, 7, RAM_BYTES);
    REQUIRE(memd_ram_discard(vm, ram, RAM_BYTES / 2) == 0);
    REQUIRE(ram[0] == 0 && ram[RAM_BYTES - 1] == 7);
    REQUIRE(memd_get_status(vm, &answer) == 0);
    REQUIRE(answer.status.size == sizeof(answer.status));
    REQUIRE(answer.status.pages == RAM_BYTES / 4096 && answer.status.connected == 0);
    REQUIRE(answer.not_ours == 0x1122334455667788);
    REQUIRE(memd_ram_remove(vm, ram, RAM_BYTES) == 0);
    REQUIRE(ram[RAM_BYTES - 1] == 7);
    munmap(ram, RAM_BYTES);
}

static void old_program(void)
{
    struct first_options options = {.size = sizeof(options),
                                    .socket = "/nonexistent/memd.sock.agent",
                                    .token = "0123456789abcdef0123456789abcdef",
                                    .vmm = "old",
                                    .ops = &first_ops};
    struct memd_vm *vm = NULL;
    int r = memd_attach(&options, &vm);

    if (r == -ENOSYS || r == -EPERM) {
        printf("no agent on this kernel: %s\n", strerror(-r));
        exit(77);
    }
    REQUIRE(r == 0 && vm);
    use(vm);
    REQUIRE(memd_detach(vm) == 0);
}

/* A version to come: its structs are these, with something behind them. */
struct future_ops {
    struct first_ops first;
    void *other_hooks[32];
};

struct future_options {
    struct first_options first;
    uint64_t more[32];
};

struct future_status {
    struct first_status first;
    uint64_t more[32];
};

static void future_program(void)
{
    struct future_ops ops = {.first = first_ops};
    struct future_options options = {.first = {.size = sizeof(options),
                                               .socket = "/nonexistent/memd.sock.agent",
                                               .ops = &ops.first}};
    struct future_status status = {.first = {.size = sizeof(status)}};
    struct memd_vm *vm = NULL;

    ops.first.size = sizeof(ops);
    ops.other_hooks[31] = (void *)(uintptr_t)&on_pause; /* this library calls it as little as */
    options.more[31] = 1; /* ... it knows what this wish means: that one it must refuse */
    REQUIRE(memd_attach(&options, &vm) == -E2BIG && !vm);
    options.more[31] = 0;
    REQUIRE(memd_attach(&options, &vm) == 0);
    memset(status.more, 0xff, sizeof(status.more));
    REQUIRE(memd_get_status(vm, &status) == 0);
    REQUIRE(status.first.size < sizeof(status) && status.more[31] == 0);
    status.first.size = sizeof(status.first) - 1;
    REQUIRE(memd_get_status(vm, &status) == -EINVAL);
    use(vm);
    REQUIRE(memd_detach(vm) == 0);
    options.first.size = sizeof(options.first) - 1;
    REQUIRE(memd_attach(&options, &vm) == -EINVAL);
    options.first.size = 1UL << 40;
    REQUIRE(memd_attach(&options, &vm) == -E2BIG);
}

int main(void)
{
    old_program();
    future_program();
    printf("both work\n");
    return 0;
}
