/* SPDX-License-Identifier: Apache-2.0 */
/* The small parts of the agent: transitions, hashes, the gate, the ring, the VMM's descriptors. */
#define XXH_INLINE_ALL
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#include "agent.h"
#include "descriptors.h"
#include "gate.h"
#include "hash.h"
#include "procfs.h"
#include "proof.h"
#include "rpc.h"
#include "transitions.h"

Test(transitions, only_the_named_ways_lead_anywhere)
{
    cr_assert_eq(transitions_next(TRANSITION_SHARE, PLACE_PRIVATE), PLACE_SHARED);
    cr_assert_eq(transitions_next(TRANSITION_SHARE, PLACE_ABSENT), -EPERM);
    cr_assert_eq(transitions_next(TRANSITION_BREAK, PLACE_SHARED), PLACE_PRIVATE);
    cr_assert_eq(transitions_next(TRANSITION_BREAK, PLACE_PRIVATE), -EPERM);
    cr_assert_eq(transitions_next(TRANSITION_FETCH, PLACE_REMOTE), PLACE_PRIVATE);
    cr_assert_eq(transitions_next(TRANSITION_SPILL, PLACE_PRIVATE), -EPERM);
    cr_assert_eq(transitions_next(TRANSITION_COUNT, PLACE_PRIVATE), -EINVAL);
    cr_assert_eq(transitions_next(TRANSITION_BREAK, PLACE_COUNT), -EINVAL);
}

Test(transitions, everything_can_be_discarded_and_every_transition_has_a_name)
{
    for (int place = 0; place < PLACE_COUNT; place++)
        cr_assert_eq(transitions_next(TRANSITION_DISCARD, (enum place)place), PLACE_ABSENT);
    for (int t = 0; t < TRANSITION_COUNT; t++)
        cr_assert_gt(strlen(transitions_name((enum transition)t)), 0);
}

Test(hash, a_zero_page_with_one_bit_anywhere_is_none)
{
    static uint8_t page[PAGE_BYTES] __attribute__((aligned(64)));

    cr_assert(hash_page_is_zero(page));
    for (size_t i = 0; i < PAGE_BYTES; i++) {
        page[i] = 0x80;
        cr_assert(!hash_page_is_zero(page));
        page[i] = 0;
    }
}

Test(hash, the_secret_counts_and_no_tag_is_zero)
{
    static uint8_t page[PAGE_BYTES];
    struct hash_secret a;
    struct hash_secret b;

    memset(&a, 1, sizeof(a));
    memset(&b, 2, sizeof(b));
    cr_assert_neq(hash_page(&a, page), hash_page(&b, page));
    cr_assert_eq(hash_tag(0), 1);
    cr_assert_eq(hash_tag(0x1234567812345678ULL), 1);
}

Test(hash, it_is_xxh3_whatever_this_cpu_can_do)
{
    static uint8_t page[PAGE_BYTES];
    struct hash_secret secret;

    for (size_t i = 0; i < sizeof(secret); i++)
        secret.bytes[i] = (uint8_t)(i * 11 + 3);
    for (uint32_t n = 0; n < 1000; n++) {
        page[n * 37 % PAGE_BYTES] += (uint8_t)(n + 1);
        cr_assert_eq(hash_page(&secret, page),
                     XXH3_64bits_withSecret(page, PAGE_BYTES, secret.bytes, sizeof(secret.bytes)));
    }
}

static int answer;
static int asked;

static int give_answer(void *opaque, const void *addr, size_t bytes)
{
    (void)opaque;
    (void)addr;
    (void)bytes;
    asked++;
    return answer;
}

static int give_state(void *opaque)
{
    (void)opaque;
    asked++;
    return answer;
}

Test(gate, a_hook_that_cannot_tell_counts_as_pinned)
{
    struct memd_ops ops = {.size = sizeof(ops), .pinned = give_answer};
    struct gate gate;

    gate_open(&gate, &ops, NULL);
    answer = 0;
    cr_assert(gate_may_freeze(&gate, NULL, 4096));
    answer = 1;
    cr_assert(!gate_may_freeze(&gate, NULL, 4096));
    answer = -EIO;
    cr_assert(!gate_may_freeze(&gate, NULL, 4096));
    cr_assert(!gate.quarantined);
}

Test(gate, a_hook_that_lies_is_not_asked_again)
{
    struct memd_ops ops = {.size = sizeof(ops), .pinned = give_answer};
    struct gate gate;

    gate_open(&gate, &ops, NULL);
    answer = 42;
    asked = 0;
    cr_assert(!gate_may_freeze(&gate, NULL, 4096));
    cr_assert(!gate_may_freeze(&gate, NULL, 4096));
    cr_assert_eq(asked, 1);
    cr_assert(gate.quarantined);
    cr_assert_not_null(gate.offence);
}

Test(gate, an_older_vmm_has_fewer_hooks)
{
    struct memd_ops ops = {.size = offsetof(struct memd_ops, pinned), .pinned = give_answer};
    struct gate gate;

    gate_open(&gate, &ops, NULL);
    answer = 1;
    cr_assert(gate_may_freeze(&gate, NULL, 4096));
}

Test(gate, pause_and_resume_come_in_pairs)
{
    struct memd_ops ops = {.size = sizeof(ops), .pause = give_state, .resume = give_state};
    struct gate gate;

    gate_open(&gate, &ops, NULL);
    answer = 0;
    cr_assert_eq(gate_resume(&gate), -EALREADY);
    cr_assert_eq(gate_pause(&gate), 0);
    cr_assert_eq(gate_pause(&gate), -EALREADY);
    cr_assert_eq(gate_resume(&gate), 0);
    answer = -EIO;
    cr_assert_eq(gate_pause(&gate), -EIO);
    cr_assert_eq(gate_resume(&gate), -EALREADY);
    gate_open(&gate, NULL, NULL);
    cr_assert_eq(gate_pause(&gate), -ENOTSUP);
}

Test(descriptors, network_and_unknown_file_systems_are_not_trusted)
{
    char reason[PROTOCOL_TEXT_BYTES];

    cr_assert(descriptors_is_known_good(0xef53));
    cr_assert(descriptors_is_known_good(0x58465342));
    cr_assert(!descriptors_is_known_good(0x6969));     /* NFS */
    cr_assert(!descriptors_is_known_good(0x00c36400)); /* Ceph */
    cr_assert(!descriptors_is_known_good(0x01021997)); /* 9p */
    cr_assert(!descriptors_is_known_good(0x794c7630)); /* overlayfs: who knows what is below */
    cr_assert(descriptors_check(false, reason));
}

static struct ring ring;

/* Its word is told from those of KVM's other descriptors, and a kernel that pins forbids nothing.
 */
Test(descriptors, a_virtual_machine_that_may_nest_others_is_seen)
{
    char reason[PROTOCOL_TEXT_BYTES] = "";
    int kvm, vm;

    cr_assert(descriptors_is_kvm("anon_inode:kvm-vm"));
    cr_assert(!descriptors_is_kvm("anon_inode:kvm-vcpu:0"));
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0)
        cr_skip("no /dev/kvm");
    cr_assert(descriptors_check(false, reason));
    cr_assert(!descriptors_check(true, reason));
    cr_assert_not_null(strstr(reason, "nested=0"));
    close(vm);
    close(kvm);
}

Test(rpc, a_full_ring_takes_no_more_and_a_lying_tail_is_not_believed)
{
    struct rpc rpc = {.fd = -1, .ring = &ring};
    uint32_t tail = 0;

    for (uint32_t i = 0; i < RING_ENTRIES; i++)
        cr_assert(rpc_put(&rpc, RING_OFFER, i, i));
    cr_assert(!rpc_put(&rpc, RING_OFFER, 0, 0));
    for (uint32_t i = 0; i < RING_ENTRIES; i++) {
        cr_assert_eq(ring_filled(&ring.to_memd, tail), RING_ENTRIES - i);
        cr_assert_eq(ring_peek(&ring.to_memd, tail).page, i);
        ring_release(&ring.to_memd, &tail);
    }
    cr_assert(rpc_put(&rpc, RING_OFFER, 0, 0));
    ring.to_memd.tail = rpc.head + 5;
    cr_assert(!rpc_put(&rpc, RING_OFFER, 0, 0));
}

Test(rpc, page_buffers_are_not_reused_before_memd_has_read_them)
{
    struct rpc rpc = {.fd = -1, .ring = &ring};
    uint32_t buffer;

    memset(&ring, 0, sizeof(ring));
    for (uint32_t i = 0; i < RING_PAGE_BUFFERS; i++) {
        cr_assert_not_null(rpc_page_buffer(&rpc, &buffer));
        cr_assert_eq(buffer, i);
        cr_assert(rpc_put(&rpc, RING_PAGE, i, buffer));
    }
    cr_assert_null(rpc_page_buffer(&rpc, &buffer));
    ring.to_memd.tail = 1;
    cr_assert_not_null(rpc_page_buffer(&rpc, &buffer));
    cr_assert_eq(buffer, 0);
}

Test(rpc, an_entry_count_that_cannot_be_is_ignored)
{
    struct rpc rpc = {.fd = -1, .ring = &ring};
    struct ring_entry entry;

    memset(&ring, 0, sizeof(ring));
    ring.to_agent.head = RING_ENTRIES + 1;
    cr_assert(!rpc_take(&rpc, &entry));
}

Test(procfs, what_is_mapped_is_seen)
{
    uint8_t *at =
        mmap(NULL, 4 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct procfs_range range;

    cr_assert_eq(procfs_inspect(at, 4 * PAGE_BYTES, &range), 0);
    cr_assert(range.covered && range.read_write && !range.file && !range.shared && !range.locked);
    madvise(at + PAGE_BYTES, PAGE_BYTES, MADV_DONTFORK);
    mprotect(at + 2 * PAGE_BYTES, PAGE_BYTES, PROT_READ);
    cr_assert_eq(procfs_inspect(at, 4 * PAGE_BYTES, &range), 0);
    cr_assert(range.covered && range.dontfork && !range.read_write);
    cr_assert_eq(procfs_inspect(at, PAGE_BYTES, &range), 0);
    cr_assert(!range.dontfork && range.read_write);
    munmap(at + PAGE_BYTES, PAGE_BYTES);
    cr_assert_eq(procfs_inspect(at, 4 * PAGE_BYTES, &range), 0);
    cr_assert(!range.covered);
    cr_assert_gt(procfs_count_vmas(), 5);
    cr_assert_gt(procfs_number("/proc/sys/vm/max_map_count"), 1000);
    cr_assert_eq(procfs_number("/proc/there/is/no/such"), -ENOENT);
}

Test(procfs, the_kernels_age_is_compared_number_by_number)
{
    cr_assert(!procfs_kernel_below(2, 6));
    cr_assert(!procfs_kernel_below(4, 20));
    cr_assert(procfs_kernel_below(999, 0));
}

/* ---- the VMA budget ---- */

Test(budget, shares_that_ended_since_the_count_may_have_left_two_vmas_each)
{
    static struct memd_vm vm;

    vm.vma_limit = 8000;
    vm.vmas = 3000;
    cr_assert_eq(run_shortest_run(&vm), 1);
    vm.ram.unmerges = 500;
    cr_assert_eq(run_shortest_run(&vm), 2);
    vm.merge.vmas_added = 2000;
    cr_assert_eq(run_shortest_run(&vm), 4);
    vm.ram.unmerges = 1500;
    cr_assert_eq(run_shortest_run(&vm), 0, "nothing may be spent");
    vm.unmerges_counted = 1500;
    cr_assert_eq(run_shortest_run(&vm), 2, "those before the count are in the count");
}

/* The other host may have another CPU, or another build of memd. */
Test(proof, a_page_s_content_is_plain_xxh3)
{
    uint8_t page[PAGE_BYTES];

    for (uint32_t number = 0; number < 100; number++) {
        for (uint32_t i = 0; i < PAGE_BYTES; i++)
            page[i] = (uint8_t)(i * number + (i >> 3));
        cr_assert_eq(proof_content(page), XXH3_64bits(page, PAGE_BYTES));
    }
}

Test(budget, it_is_counted_again_before_too_much_is_believed)
{
    static struct memd_vm vm;

    vm.vma_limit = 80000;
    vm.merge.vmas_added = 10000;
    cr_assert_not(run_count_again(&vm), "an eighth is believed");
    vm.ram.unmerges = 1;
    cr_assert(run_count_again(&vm));
    cr_assert_gt(vm.vmas, 10);
    cr_assert_eq(vm.merge.vmas_added, 0);
    cr_assert_eq(vm.ram.vmas_allowed, 80000 + 80000 / 6 - vm.vmas, "and what breaks may cost");
    vm.ram.unmerges += 40000;
    cr_assert_eq(run_shortest_run(&vm), 0);
    cr_assert(run_count_again(&vm));
    cr_assert_eq(run_shortest_run(&vm), 1);
}
