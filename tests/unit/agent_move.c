/* SPDX-License-Identifier: Apache-2.0 */
#include "agent_move.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "discard.h"
#include "merge_row.h"
#include "remap.h"

static struct move_pair pair;

static void set_up(void)
{
    move_set_up(&pair);
    move_fill(&pair);
}

static void tear_down(void)
{
    move_tear_down(&pair);
}

TestSuite(agent_move, .init = set_up, .fini = tear_down, .timeout = 120);

static void assert_sums(const struct move_guest *guest)
{
    for (uint32_t b = 0; b < MOVE_BLOCKS; b++) {
        uint64_t sum = 0;

        for (int p = 0; p < PLACE_COUNT; p++)
            sum += guest->blocks[b]->counts[p];
        cr_assert_eq(sum, guest->blocks[b]->pages);
    }
    cr_assert_eq(guest->ram.refused_transitions, 0);
}

static void assert_all_right(void)
{
    for (uint32_t page = 0; page < MOVE_PAGES; page++)
        cr_assert(move_is_right(&pair, page), "page %u", page);
    assert_sums(&pair.to);
}

Test(agent_move, every_page_arrives_and_empty_ones_cost_no_bytes)
{
    uint64_t full = 0;

    for (uint32_t page = 0; page < MOVE_PAGES; page++)
        full += !move_is_empty(page);
    move_open(&pair, NULL);
    move_begin(&pair);
    move_wait_proven(&pair);
    assert_all_right();
    cr_assert_eq(pair.incoming.counts.data, full);
    cr_assert_leq(pair.outgoing.bulk.bytes_out + pair.outgoing.urgent.bytes_out,
                  full * PAGE_BYTES + MOVE_PAGES * 2 * WIRE_HEADER_BYTES + 32768);
    cr_assert_eq(pair.outgoing.proven_pages, MOVE_PAGES);
}

/* With a limit that would take minutes the pages come by being asked for. */
Test(agent_move, a_limit_on_the_bandwidth_does_not_hold_back_who_waits)
{
    struct mover_tuning tuning = {.bandwidth = 64 << 10};

    move_open(&pair, &tuning);
    move_begin(&pair);
    assert_all_right();
    move_wait_proven(&pair);
    cr_assert_gt(pair.incoming.counts.demand, 0);
    cr_assert_eq(incoming_times(&pair.incoming).count, pair.incoming.counts.demand);
}

static void move_with_switch(uint32_t what, uint64_t bandwidth)
{
    struct mover_tuning tuning = {.bandwidth = bandwidth, .switches = what};

    move_open(&pair, &tuning);
    move_begin(&pair);
    assert_all_right();
    move_wait_proven(&pair);
}

Test(agent_move, without_locality)
{
    move_with_switch(MOVER_NO_LOCALITY, 1 << 20);
    cr_assert_gt(pair.incoming.counts.demand, 0);
}

Test(agent_move, without_the_urgent_connection)
{
    move_with_switch(MOVER_NO_URGENT, 8 << 20);
}

Test(agent_move, without_pipelining)
{
    move_with_switch(MOVER_NO_PIPELINE, 1 << 20);
}

static void move_held(uint32_t what)
{
    static const uint32_t pages[] = {0, 100, 300, 1400};
    struct mover_tuning tuning = {.switches = what};

    move_open(&pair, &tuning);
    cr_assert_eq(incoming_expect(&pair.incoming), 0);
    move_link(&pair);
    move_stop(&pair, true);
    move_wait(&pair.incoming.mapped);
    for (size_t i = 0; i < sizeof(pages) / sizeof(pages[0]); i++)
        cr_assert(move_is_right(&pair, pages[i]));
    cr_expect_leq(pair.incoming.counts.data, sizeof(pages) / sizeof(pages[0]));
    outgoing_release(&pair.outgoing);
    move_wait_proven(&pair);
    assert_all_right();
}

/* While the guest stands still the CPU and the link are for what it waits for. */
Test(agent_move, what_is_held_comes_only_when_it_is_asked_for)
{
    move_held(0);
}

Test(agent_move, what_is_held_comes_when_it_is_asked_for_on_bulk)
{
    move_held(MOVER_NO_URGENT);
}

/* What the pusher sends ahead of a sequence is not asked for. */
Test(agent_move, a_sequence_of_faults_is_answered_ahead)
{
    struct mover_tuning tuning = {.bandwidth = 64 << 10};
    uint64_t touched = 0;

    move_open(&pair, &tuning);
    move_begin(&pair);
    for (uint32_t page = 0; page < 600; page++, touched++)
        cr_assert(move_is_right(&pair, page));
    cr_assert_lt(pair.incoming.counts.demand, touched / 2);
}

static void *read_some(void *context)
{
    uintptr_t first = (uintptr_t)context;

    for (uint32_t page = (uint32_t)first; page < MOVE_PAGES; page += 16)
        if (!move_is_right(&pair, page))
            return &pair;
    return NULL;
}

Test(agent_move, what_touches_memory_before_the_map_waits_and_gets_its_bytes)
{
    pthread_t readers[3];
    void *wrong;

    move_open(&pair, NULL);
    cr_assert_eq(incoming_expect(&pair.incoming), 0);
    for (uintptr_t i = 0; i < 3; i++)
        pthread_create(&readers[i], NULL, read_some, (void *)i);
    while (__atomic_load_n(&pair.incoming.counts.demand, __ATOMIC_ACQUIRE) < 3)
        usleep(100);
    move_link(&pair);
    move_stop(&pair, false);
    for (int i = 0; i < 3; i++) {
        pthread_join(readers[i], &wrong);
        cr_assert_null(wrong);
    }
    move_wait_proven(&pair);
    assert_all_right();
}

/* ---- discards ---- */

static int discard(uint32_t page, uint32_t pages)
{
    struct ram_block *block = ram_find(&pair.to.ram, move_at(&pair.to, page));
    int r;

    lock_take(&block->lock);
    r = discard_pages(&pair.to.ram, block,
                      (uint32_t)((move_at(&pair.to, page) - block->base) / (long)PAGE_BYTES), pages,
                      MADV_DONTNEED);
    lock_release(&block->lock);
    return r;
}

Test(agent_move, a_page_that_was_given_up_reads_as_zeros_whatever_comes)
{
    struct mover_tuning tuning = {.bandwidth = 4 << 20};

    move_open(&pair, &tuning);
    move_begin(&pair);
    move_wait(&pair.incoming.mapped);
    for (uint32_t page = 0; page + 8 < MOVE_PAGES_0; page += 16)
        cr_assert_eq(discard(page, 8), 0);
    move_wait_proven(&pair);
    for (uint32_t page = 0; page < MOVE_PAGES_0; page++)
        cr_assert(page % 16 < 8 ? move_is_zero(move_at(&pair.to, page))
                                : move_is_right(&pair, page),
                  "page %u", page);
    cr_assert_lt(incoming_placed(&pair.incoming), MOVE_PAGES);
}

static void *read_first(void *context)
{
    (void)context;
    return move_is_zero(move_at(&pair.to, 0)) ? NULL : &pair;
}

/* No connection: what is asked for never comes. */
Test(agent_move, who_waits_for_a_page_that_is_given_up_gets_zeros)
{
    pthread_t reader;
    void *wrong;

    move_open(&pair, NULL);
    cr_assert_eq(incoming_expect(&pair.incoming), 0);
    pthread_create(&reader, NULL, read_first, NULL);
    while (__atomic_load_n(&pair.incoming.counts.demand, __ATOMIC_ACQUIRE) == 0)
        usleep(100);
    cr_assert_eq(discard(0, 1), 0);
    pthread_join(reader, &wrong);
    cr_assert_null(wrong);
}

Test(agent_move, remote_memory_is_not_let_go)
{
    struct ram_block *block = pair.to.blocks[0];
    uint32_t left;

    move_open(&pair, NULL);
    cr_assert_eq(incoming_expect(&pair.incoming), 0);
    lock_take(&block->lock);
    discard_disarm(&pair.to.ram, block, 0, CHUNK_EMPTY);
    cr_assert_eq(block->chunks[0].state, CHUNK_ARMED);
    left = discard_stand_down(&pair.to.ram, block, 1);
    lock_release(&block->lock);
    cr_assert_eq(left, ram_chunk_end(block, 1) - ram_chunk_first(block, 1));
    cr_assert_eq(block->chunks[1].state, CHUNK_ARMED);
    cr_assert_eq(block->counts[PLACE_REMOTE], MOVE_PAGES_0);
}

/* What a child of the VMM gets of page 1: the signal that ends it, or 0 when it was right. */
static int read_in_child(void)
{
    int status = 0;
    pid_t pid = fork();

    if (pid == 0) {
        signal(SIGSEGV, SIG_DFL);
        _exit(move_is_right(&pair, 1) ? 0 : 1);
    }
    cr_assert_eq(waitpid(pid, &status, 0), pid);
    cr_assert(WIFSIGNALED(status) || WEXITSTATUS(status) == 0, "the child read something else");
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

/* It would have copies of the mappings without the userfaultfd, and read zeros. */
Test(agent_move, a_child_has_no_memory_that_is_still_to_come)
{
    move_open(&pair, NULL);
    cr_assert_eq(incoming_expect(&pair.incoming), 0);
    cr_assert_eq(read_in_child(), SIGSEGV);
    move_link(&pair);
    move_stop(&pair, false);
    move_wait_proven(&pair);
    incoming_close(&pair.incoming);
    cr_assert_eq(read_in_child(), 0);
    cr_assert_eq(incoming_open(&pair.incoming, &pair.to.ram, &pair.to.handler,
                               &(struct mover_tuning){0}, pair.news_to),
                 0);
}

/* ---- connections that break ---- */

Test(agent_move, links_that_are_cut_at_random_are_taken_up_again)
{
    struct mover_tuning tuning = {.bandwidth = 20 << 20};
    uint32_t cuts = getenv("MEMD_FULL") ? 1000 : 50;
    pthread_t readers[2];
    void *wrong;

    srandom(7);
    move_open(&pair, &tuning);
    move_begin(&pair);
    for (uintptr_t i = 0; i < 2; i++)
        pthread_create(&readers[i], NULL, read_some, (void *)(i * 5));
    for (uint32_t cut = 0; cut < cuts; cut++) {
        usleep((useconds_t)(random() % 10000));
        move_link(&pair);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(readers[i], &wrong);
        cr_assert_null(wrong);
    }
    move_wait_proven(&pair);
    assert_all_right();
}

/* The end of one connection is told, and is no success; the other side hears of it too. */
Test(agent_move, the_end_of_a_connection_is_told)
{
    struct stream_cut cut;
    struct mover_tuning tuning = {.bandwidth = 1 << 20};

    move_open(&pair, &tuning);
    move_begin(&pair);
    move_wait(&pair.incoming.mapped);
    outgoing_link(&pair.outgoing, MOVER_URGENT, -1, 1);
    outgoing_link(&pair.outgoing, MOVER_BULK, -1, 1);
    while (!stream_take_cut(&pair.incoming.bulk, &cut))
        usleep(200);
    cr_assert_eq(cut.result, -EPIPE);
    while (!stream_take_cut(&pair.incoming.urgent, &cut))
        usleep(200);
    cr_assert_eq(cut.epoch, 1);
    cr_assert_eq(pair.incoming.proven, 0);
    move_link(&pair);
    move_wait_proven(&pair);
    assert_all_right();
}

/* Nothing but what was on its way is sent again. */
Test(agent_move, what_has_arrived_is_not_sent_again)
{
    struct mover_tuning tuning = {.bandwidth = 8 << 20};
    uint64_t placed;

    move_open(&pair, &tuning);
    move_begin(&pair);
    while ((placed = __atomic_load_n(&pair.incoming.counts.data, __ATOMIC_RELAXED)) < 500)
        usleep(200);
    incoming_link(&pair.incoming, MOVER_BULK, -1, 1);
    incoming_link(&pair.incoming, MOVER_URGENT, -1, 1);
    usleep(20000);
    move_link(&pair);
    move_wait_proven(&pair);
    assert_all_right();
    /* 64 KiB frames, 256 KiB batches, and what a socket holds. */
    cr_assert_lt(pair.outgoing.counts.resent, 200);
    cr_assert_eq(pair.incoming.counts.dropped, 0);
}

/* ---- peers that are none ---- */

static int connect_to_destination(uint32_t channel)
{
    int ends[2];

    cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    incoming_link(&pair.incoming, channel, ends[1], 1);
    return ends[0];
}

static void assert_refused(struct stream *stream, const char *words)
{
    struct stream_cut cut;

    while (!stream_take_cut(stream, &cut))
        usleep(200);
    cr_assert_eq(cut.result, -EPROTO);
    cr_assert_not_null(strstr(cut.reason, words), "%s", cut.reason);
}

static void say(int fd, enum wire_type type, uint32_t count, uint64_t page, const void *payload,
                size_t bytes)
{
    uint8_t header[WIRE_HEADER_BYTES];
    struct iovec parts[2] = {{header, sizeof(header)}, {(void *)payload, bytes}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};

    wire_write_header(header, type, count, page);
    cr_assert_eq(sendmsg(fd, &message, MSG_NOSIGNAL), (ssize_t)(sizeof(header) + bytes));
}

static int begin_alone(void)
{
    move_open(&pair, NULL);
    cr_assert_eq(incoming_expect(&pair.incoming), 0);
    return connect_to_destination(MOVER_BULK);
}

Test(agent_move, pages_outside_of_the_regions)
{
    static uint8_t bytes[2 * PAGE_BYTES];
    int fd = begin_alone();

    say(fd, WIRE_DATA, 2, MOVE_PAGES - 1, bytes, sizeof(bytes));
    assert_refused(&pair.incoming.bulk, "outside");
    cr_assert_eq(incoming_remote(&pair.incoming), MOVE_PAGES);
    close(fd);
}

Test(agent_move, a_map_with_a_gap)
{
    struct wire_run runs[2] = {{0, 10, WIRE_KIND_REMOTE}, {11, 10, WIRE_KIND_REMOTE}};
    uint8_t payload[sizeof(runs)];
    int fd = begin_alone();

    wire_write_run(payload, 0, &runs[0]);
    wire_write_run(payload, 1, &runs[1]);
    say(fd, WIRE_MAP, 2, 0, payload, sizeof(payload));
    assert_refused(&pair.incoming.bulk, "gaps");
    close(fd);
}

Test(agent_move, a_map_that_ends_too_early)
{
    struct wire_run run = {0, 10, WIRE_KIND_EMPTY};
    uint8_t payload[sizeof(run)];
    int fd = begin_alone();

    wire_write_run(payload, 0, &run);
    say(fd, WIRE_MAP, 1, 0, payload, sizeof(payload));
    say(fd, WIRE_MAP_END, 0, MOVE_PAGES, NULL, 0);
    assert_refused(&pair.incoming.bulk, "early");
    cr_assert_eq(pair.incoming.mapped, 0);
    close(fd);
}

Test(agent_move, a_reference_to_what_was_never_sent)
{
    uint32_t content = 0;
    int fd = begin_alone();

    say(fd, WIRE_REF, 1, 0, &content, sizeof(content));
    assert_refused(&pair.incoming.bulk, "not sent");
    close(fd);
}

/* A source that claims to have sent what it has not: the page is asked for, and is no zeros. */
Test(agent_move, a_map_that_claims_what_never_came)
{
    struct wire_run run = {0, MOVE_PAGES, WIRE_KIND_HAVE};
    uint8_t payload[sizeof(run)];
    uint8_t want[WIRE_HEADER_BYTES];
    int fd = begin_alone();
    int urgent = connect_to_destination(MOVER_URGENT);

    wire_write_run(payload, 0, &run);
    say(fd, WIRE_MAP, 1, 0, payload, sizeof(payload));
    say(fd, WIRE_MAP_END, 0, MOVE_PAGES, NULL, 0);
    cr_assert_eq(recv(urgent, want, sizeof(want), MSG_WAITALL), (ssize_t)sizeof(want));
    cr_assert_eq(want[0], WIRE_WANT);
    cr_assert_eq(incoming_remote(&pair.incoming), MOVE_PAGES);
    close(fd);
    close(urgent);
}

Test(agent_move, a_destination_that_says_nonsense)
{
    uint8_t garbage[64];
    int ends[2];

    memset(garbage, 0xa5, sizeof(garbage));
    move_open(&pair, NULL);
    move_begin(&pair);
    cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    outgoing_link(&pair.outgoing, MOVER_URGENT, ends[0], 2);
    cr_assert_eq(send(ends[1], garbage, sizeof(garbage), 0), (ssize_t)sizeof(garbage));
    assert_refused(&pair.outgoing.urgent, "type");
    close(ends[1]);
}

Test(agent_move, sums_that_do_not_agree)
{
    uint64_t sums[MOVE_BLOCKS] = {1, 2};
    uint8_t answer[WIRE_HEADER_BYTES];
    struct wire_limits limits = {WIRE_AT_DESTINATION_URGENT, MOVE_PAGES, MOVE_BLOCKS, 0};
    struct wire_frame frame;
    const char *reason = "";
    uint32_t payload;
    int ends[2];

    move_open(&pair, NULL);
    move_begin(&pair);
    cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    move_wait_proven(&pair);
    pair.outgoing.proven = 0;
    outgoing_link(&pair.outgoing, MOVER_URGENT, ends[0], 2);
    say(ends[1], WIRE_DONE, MOVE_BLOCKS, 0, sums, sizeof(sums));
    cr_assert_eq(recv(ends[1], answer, sizeof(answer), MSG_WAITALL), (ssize_t)sizeof(answer));
    cr_assert_eq(wire_read_header(&limits, answer, &frame, &payload, &reason), 0);
    cr_assert_eq(frame.type, WIRE_PROVEN);
    cr_assert_eq(frame.count, EBADMSG);
    move_wait(&pair.outgoing.proven);
    cr_assert_eq(pair.outgoing.proven_result, -EBADMSG);
    close(ends[1]);
}

/* ---- the guest runs at the source: pre-copy ---- */

static volatile bool writing;

/* Rewrites every third page with the same content under another number, again and again. */
static void *write_on(void *context)
{
    uint32_t round = 0;

    (void)context;
    while (__atomic_load_n(&writing, __ATOMIC_ACQUIRE)) {
        for (uint32_t page = 0; page < MOVE_PAGES; page += 3)
            move_write(move_at(&pair.from, page), page * 1000 + round);
        round++;
    }
    return NULL;
}

static void assert_like_source(void)
{
    for (uint32_t page = 0; page < MOVE_PAGES; page++)
        cr_assert_eq(memcmp(move_at(&pair.from, page), move_at(&pair.to, page), PAGE_BYTES), 0,
                     "page %u", page);
    assert_sums(&pair.to);
    assert_sums(&pair.from);
}

static void discard_at_source(uint32_t page, uint32_t pages)
{
    struct ram_block *block = ram_find(&pair.from.ram, move_at(&pair.from, page));

    lock_take(&block->lock);
    cr_assert_eq(
        discard_pages(&pair.from.ram, block,
                      (uint32_t)((move_at(&pair.from, page) - block->base) / (long)PAGE_BYTES),
                      pages, MADV_DONTNEED),
        0);
    lock_release(&block->lock);
}

/* How many pages were left for the push. */
static uint64_t precopy(uint32_t passes)
{
    pthread_t writer;
    uint64_t pending;

    move_open(&pair, NULL);
    cr_assert_eq(incoming_expect(&pair.incoming), 0);
    move_link(&pair);
    writing = true;
    pthread_create(&writer, NULL, write_on, NULL);
    outgoing_precopy(&pair.outgoing);
    while (__atomic_load_n(&pair.outgoing.passes_ended, __ATOMIC_ACQUIRE) < passes)
        usleep(500);
    discard_at_source(512, 512);
    discard_at_source(20, 5);
    while (__atomic_load_n(&pair.outgoing.passes_ended, __ATOMIC_ACQUIRE) < passes + 2)
        usleep(500);
    __atomic_store_n(&writing, false, __ATOMIC_RELEASE);
    pthread_join(writer, NULL);
    discard_at_source(100, 5);
    move_stop(&pair, true);
    pending = outgoing_pending(&pair.outgoing);
    outgoing_release(&pair.outgoing);
    move_wait_proven(&pair);
    assert_like_source();
    return pending;
}

/* Chunk 1 is full, chunk 0 is not, and that is known before anything is asked for. */
static void open_foreseen(void)
{
    const uint8_t *full;

    for (uint32_t page = HUGE_PAGES; page < 2 * HUGE_PAGES; page++)
        move_write(move_at(&pair.from, page), page);
    move_open(&pair, NULL);
    full = pair.outgoing.passes.full;
    while (!__atomic_load_n(&full[1], __ATOMIC_ACQUIRE))
        usleep(200);
    cr_assert_eq(full[0], 0, "it has pages that hold nothing");
    cr_assert_eq(incoming_expect(&pair.incoming), 0);
    move_link(&pair);
}

static void end_foreseen(void)
{
    outgoing_release(&pair.outgoing);
    move_wait_proven(&pair);
    assert_like_source();
}

/* Such a chunk is not looked at when the guest has stopped. */
Test(agent_move, what_was_foreseen_and_is_given_up_is_empty_there)
{
    open_foreseen();
    discard_at_source(HUGE_PAGES + 100, 20);
    move_stop(&pair, true);
    cr_assert(regions_test(pair.outgoing.pending, HUGE_PAGES + 100), "it was looked at");
    cr_assert_not(regions_test(pair.outgoing.pending, 3), "a page of a chunk that is not full");
    end_foreseen();
    cr_assert(move_is_zero(move_at(&pair.to, HUGE_PAGES + 100)));
}

/* After passes most of it is there already. */
Test(agent_move, what_was_foreseen_is_not_sent_again_after_passes)
{
    open_foreseen();
    outgoing_precopy(&pair.outgoing);
    while (__atomic_load_n(&pair.outgoing.passes_ended, __ATOMIC_ACQUIRE) < 2)
        usleep(500);
    move_stop(&pair, true);
    cr_assert_not(regions_test(pair.outgoing.pending, HUGE_PAGES + 100));
    end_foreseen();
}

Test(agent_move, what_is_written_while_it_is_sent_is_sent_again)
{
    precopy(3);
}

static void arm_source(void)
{
    for (uint32_t b = 0; b < MOVE_BLOCKS; b++) {
        struct ram_block *block = pair.from.blocks[b];

        lock_take(&block->lock);
        cr_assert_eq(remap_arm(&pair.from.ram, block, 0, block->pages), 0);
        for (uint32_t c = 0; c < block->chunk_count; c++)
            block->chunks[c].state = CHUNK_ARMED;
        for (uint32_t i = 0; i < block->pages; i++)
            if ((block->first_page + i) % 7 != 3)
                ram_move_places(&pair.from.ram, block, i, 1, TRANSITION_POPULATE);
        lock_release(&block->lock);
    }
}

Test(agent_move, the_same_in_memory_that_is_armed)
{
    arm_source();
    /* A third is rewritten all the time; what was emptied may have become one huge page. */
    cr_assert_lt(precopy(3), MOVE_PAGES - 200);
}

Test(agent_move, a_migration_that_is_given_up_leaves_the_source_as_it_was)
{
    move_open(&pair, NULL);
    cr_assert_eq(incoming_expect(&pair.incoming), 0);
    move_link(&pair);
    outgoing_precopy(&pair.outgoing);
    while (__atomic_load_n(&pair.outgoing.passes_ended, __ATOMIC_ACQUIRE) < 1)
        usleep(500);
    outgoing_close(&pair.outgoing);
    for (uint32_t b = 0; b < MOVE_BLOCKS; b++)
        for (uint32_t c = 0; c < pair.from.blocks[b]->chunk_count; c++)
            cr_assert_eq(pair.from.blocks[b]->chunks[c].tracked, 0);
    for (uint32_t page = 0; page < MOVE_PAGES; page++)
        cr_assert(move_is_empty(page) ? move_is_zero(move_at(&pair.from, page))
                                      : move_holds(move_at(&pair.from, page), page + 1));
    cr_assert_eq(outgoing_open(&pair.outgoing, &pair.from.ram, &(struct mover_tuning){0},
                               pair.news_from, NULL),
                 0);
}

/* ---- shared pages ---- */

static int make_segment(uint32_t pages)
{
    int fd = memfd_create("memd-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint8_t page[PAGE_BYTES];

    for (uint32_t i = 0; i < pages; i++) {
        move_write(page, 90000 + i);
        cr_assert_eq(pwrite(fd, page, PAGE_BYTES, i * (off_t)PAGE_BYTES), (ssize_t)PAGE_BYTES);
    }
    cr_assert_eq(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL),
                 0);
    return fd;
}

/* 640 pages of the source share 64 contents, ten each. */
static void share_pages(void)
{
    static struct merge_stats stats;
    struct ram_block *block = pair.from.blocks[0];
    uint8_t outcomes[64];

    arm_source();
    cr_assert_eq(segments_add(&pair.from.segments, 1, 64, make_segment(64)), 0);
    for (uint32_t i = 0; i < 640; i++)
        move_write(ram_address(block, i), 90000 + i % 64);
    for (uint32_t i = 0; i < 640; i += 64)
        merge_row(&pair.from.ram, &pair.from.segments, block, i, SLOT(1, 0), 64, outcomes, &stats);
    cr_assert_eq(block->counts[PLACE_SHARED], 640);
}

Test(agent_move, what_several_pages_share_costs_its_bytes_once)
{
    share_pages();
    move_open(&pair, NULL);
    move_begin(&pair);
    move_wait_proven(&pair);
    assert_like_source();
    cr_assert_eq(pair.outgoing.counts.slot, 640, "%lu", (unsigned long)pair.outgoing.counts.slot);
    cr_assert_eq(pair.incoming.counts.slot, 640);
    cr_assert_lt(pair.outgoing.bulk.bytes_out, (MOVE_PAGES - 640 + 64 + 16) * PAGE_BYTES);
}

Test(agent_move, shares_that_break_while_they_are_sent)
{
    share_pages();
    precopy(2);
    cr_assert_gt(pair.outgoing.counts.slot, 0);
}

Test(agent_move, shared_contents_across_cuts)
{
    struct mover_tuning tuning = {.bandwidth = 4 << 20};

    share_pages();
    move_open(&pair, &tuning);
    move_begin(&pair);
    for (int i = 0; i < 20; i++) {
        usleep(3000);
        move_link(&pair);
    }
    move_wait_proven(&pair);
    assert_like_source();
}
