/* SPDX-License-Identifier: Apache-2.0 */
/* What must hold, whatever anybody says. See sim.h. */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "member.h"
#include "sim.h"
#include "status.h"

/* A turn: 256 entries of each session, each of which may carry a page; 64 pages of each domain that
 * are hashed again after a restart; 16 of a neutral file. */
#define HASHES_A_SESSION 256U
#define HASHES_A_DOMAIN  80U
#define RESIDENT_MAX     (768ULL << 20)
#define LOOK_AT_MEMORY   16U /* turns */

void sim_wrong(struct sim *sim, const char *format, ...)
{
    va_list arguments;
    int used;

    if (sim->wrong[0])
        return;
    used = snprintf(sim->wrong, sizeof(sim->wrong), "seed %" PRIu64 ", step %" PRIu64 ": ",
                    sim->options.seed, sim->steps);
    va_start(arguments, format);
    vsnprintf(sim->wrong + used, sizeof(sim->wrong) - (size_t)used, format, arguments);
    va_end(arguments);
}

int sim_check_count_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int count = 0;

    while (dir && readdir(dir))
        count++;
    if (dir)
        closedir(dir);
    return count - 3; /* ".", "..", and the directory itself */
}

/* ---- segments ---- */

/* Contents say who made them: nobody sees what belongs to a guest of another domain. */
static void check_contents(struct sim_vmm *vmm, const struct sim_segment *segment)
{
    for (uint32_t i = 0; i < segment->pages; i++) {
        uint32_t content, owner;

        if (sim_content_read(segment->bytes + i * PAGE_BYTES, &content)) {
            if (!vmm->sim->options.liars)
                sim_wrong(vmm->sim, "segment %u of %s holds what nobody has", segment->id,
                          vmm->name);
            continue;
        }
        owner = sim_content_owner(content);
        if (owner && owner != sim_content_owner_of(vmm))
            sim_wrong(vmm->sim, "%s sees content of a stranger in segment %u", vmm->name,
                      segment->id);
    }
}

/* The kernel's inode says whether two descriptors are one segment. */
void sim_check_segment(struct sim_vmm *vmm, const struct sim_segment *segment)
{
    struct sim *sim = vmm->sim;
    struct stat about;
    uint32_t place;

    if (fstat(segment->fd, &about))
        return;
    place = (uint32_t)(about.st_ino * 0x9e3779b1U) % SIM_SEGMENTS_SEEN;
    while (sim->seen[place].inode && sim->seen[place].inode != about.st_ino)
        place = (place + 1) % SIM_SEGMENTS_SEEN;
    if (sim->seen[place].inode && sim->seen[place].session != vmm->session)
        sim_wrong(sim, "%s was given a segment of another domain", vmm->name);
    if (!sim->seen[place].inode && ++sim->seen_count > SIM_SEGMENTS_SEEN / 2) {
        memset(sim->seen, 0, SIM_SEGMENTS_SEEN * sizeof(*sim->seen));
        sim->seen_count = 1;
    }
    sim->seen[place] = (struct sim_seen){about.st_ino, vmm->session};
    check_contents(vmm, segment);
}

/* What is shared has the bytes that the page had when it was compared. */
static void check_shared_bytes(struct sim_vmm *vmm)
{
    _Alignas(8) uint8_t own[PAGE_BYTES];

    for (uint32_t i = 0; i < vmm->page_count; i++) {
        const struct sim_page *page = &vmm->pages[i];
        const struct sim_segment *found = NULL;

        if (page->slot == SLOT_NONE)
            continue;
        for (uint32_t k = 0; k < vmm->segment_count; k++) {
            if (vmm->segments[k].id == SLOT_SEGMENT(page->slot))
                found = &vmm->segments[k];
        }
        sim_content_expand(page->content, own);
        if (!found ||
            memcmp(found->bytes + SLOT_PAGE(page->slot) * PAGE_BYTES, own, PAGE_BYTES) != 0)
            sim_wrong(vmm->sim, "page %u of %s does not read as what it was", i, vmm->name);
    }
}

/* ---- a turn ---- */

static void check_memory(struct sim *sim)
{
    unsigned long total, resident = 0;
    FILE *file = fopen("/proc/self/statm", "re");

    if (file && fscanf(file, "%lu %lu", &total, &resident) == 2 &&
        resident * PAGE_BYTES > RESIDENT_MAX)
        sim_wrong(sim, "memd takes %lu MiB", resident >> 8);
    if (file)
        fclose(file);
}

static void check_liars(struct sim *sim)
{
    for (uint32_t i = 0; i < SIM_VMMS; i++) {
        struct sim_vmm *vmm = &sim->vmms[i];
        char byte;

        if (!vmm->must_end_by || sim->turns < vmm->must_end_by || vmm->link != SIM_SERVED)
            continue;
        vmm->must_end_by = 0;
        errno = 0;
        /* What memd said before it hung up has to be read first, and that it did not read all. */
        while (recv(vmm->fd, &byte, 1, MSG_DONTWAIT) > 0 || errno == ECONNRESET)
            errno = 0;
        if (recv(vmm->fd, &byte, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN)
            sim_wrong(sim, "%s lied (%s) and is still served", vmm->name, vmm->lie);
        sim_vmm_disconnect(vmm);
    }
}

/* Who has hung up is not told what memd thinks of it. */
static void check_nobody_is_called_a_liar(struct sim *sim)
{
    const struct guest *guest = sim->daemon.registry.first;

    if (sim->options.liars || !sim->daemon.agents.ended_badly)
        return;
    while (guest && guest->presence != AGENT_LOST)
        guest = guest->next;
    sim_wrong(sim, "an agent is called a liar, everybody is honest: %s",
              guest ? guest->reason : "its guest has gone");
}

void sim_check_turn(struct sim *sim)
{
    uint64_t domains = 0;

    for (const struct trust_domain *domain = sim->daemon.domains.first; domain;
         domain = domain->next)
        domains++;
    if (sim->host.turn_hashes >
        HASHES_A_SESSION * (uint64_t)sim->daemon.agents.count + HASHES_A_DOMAIN * (domains + 1))
        sim_wrong(sim, "one turn hashed %" PRIu64 " pages", sim->host.turn_hashes);
    if (sim->turns % LOOK_AT_MEMORY == 0)
        check_memory(sim);
    check_liars(sim);
    check_nobody_is_called_a_liar(sim);
}

/* ---- memd's tables ---- */

void sim_check_tables(struct sim *sim)
{
    uint64_t pages = 0;

    for (const struct trust_domain *domain = sim->daemon.domains.first; domain;
         domain = domain->next) {
        const char *wrong = ksm_member_check(domain);

        if (wrong)
            sim_wrong(sim, "domain '%s': %s", domain->name, wrong);
        pages += domain->store.pages;
    }
    if (pages != sim->daemon.domains.budget.used_pages)
        sim_wrong(sim, "the store's budget is not what its segments take");
}

/* ---- at rest ---- */

static uint64_t member_of(json_t *json, const char *name)
{
    return (uint64_t)json_integer_value(json_object_get(json, name));
}

static json_t *guest_in(json_t *status, const char *name)
{
    json_t *guests = json_object_get(status, "guests"), *guest;
    size_t i;

    json_array_foreach(guests, i, guest)
    {
        if (strcmp(json_string_value(json_object_get(guest, "name")), name) == 0)
            return guest;
    }
    return NULL;
}

static void check_guest(struct sim_vmm *vmm, json_t *status)
{
    uint64_t places[PLACE_COUNT], sum = 0, managed = 0;
    json_t *guest = guest_in(status, vmm->name), *shown;

    if (!guest) {
        sim_wrong(vmm->sim, "%s is not in the status", vmm->name);
        return;
    }
    shown = json_object_get(guest, "places");
    sim_vmm_places(vmm, places);
    for (int place = 0; place < PLACE_COUNT; place++) {
        uint64_t said = member_of(shown, place_name((enum place)place));

        sum += said;
        if (said != places[place])
            sim_wrong(vmm->sim, "%s has %" PRIu64 " pages in place '%s', memd says %" PRIu64,
                      vmm->name, places[place], place_name((enum place)place), said);
    }
    for (uint32_t i = 0; i < vmm->block_count; i++)
        managed += vmm->blocks[i].live ? vmm->blocks[i].pages : 0;
    if (sum != managed)
        sim_wrong(vmm->sim, "the places of %s do not sum to its pages", vmm->name);
}

/* memd's own count of shares, page by page. */
static void check_member(struct sim_vmm *vmm)
{
    const struct guest *guest = registry_find(&vmm->sim->daemon, vmm->name);
    const struct ksm_member *member =
        guest && guest->session ? agents_member(guest->session) : NULL;

    for (uint32_t i = 0; member && i < vmm->page_count && i < member->pages; i++) {
        uint32_t ref = ksm_ref_of(member, i), slot = vmm->pages[i].slot;
        bool shared = ksm_ref_state(member->domain, ref) == PAGE_SHARED;

        if (shared != (slot != SLOT_NONE) ||
            (shared && ksm_ref_value(member->domain, ref) != slot)) {
            sim_wrong(vmm->sim, "page %u of %s is %s, memd believes the opposite", i, vmm->name,
                      slot != SLOT_NONE ? "shared" : "not shared");
            return;
        }
    }
    if (!member)
        sim_wrong(vmm->sim, "%s has no session at rest", vmm->name);
    else if (member->asked || member->remap_count)
        sim_wrong(vmm->sim, "%s has answered everything, memd waits for more", vmm->name);
}

static void check_sharing(struct sim *sim, json_t *status)
{
    json_t *sharing = json_object_get(status, "sharing");
    uint64_t shared = 0, used = 0;

    for (uint32_t i = 0; i < SIM_VMMS; i++) {
        uint64_t places[PLACE_COUNT];

        if (sim->vmms[i].link != SIM_SERVED)
            continue;
        sim_vmm_places(&sim->vmms[i], places);
        shared += places[PLACE_SHARED];
    }
    for (const struct trust_domain *domain = sim->daemon.domains.first; domain;
         domain = domain->next)
        used += domain->store.used;
    if (member_of(sharing, "pages_shared") != used ||
        member_of(sharing, "pages_sharing") != shared - used)
        sim_wrong(
            sim, "%" PRIu64 " pages share %" PRIu64 " slots, memd says %" PRIu64 " and %" PRIu64,
            shared, used, member_of(sharing, "pages_sharing"), member_of(sharing, "pages_shared"));
}

static void check_segments(struct sim *sim)
{
    for (const struct trust_domain *domain = sim->daemon.domains.first; domain;
         domain = domain->next) {
        for (const struct ksm_segment *segment = domain->store.first; segment;
             segment = segment->next) {
            if (!segment->users)
                sim_wrong(sim, "segment %u of '%s' lives (state %d, %u holders) and nobody uses it",
                          segment->id, domain->name, (int)segment->state, segment->holders);
        }
    }
}

/* Every descriptor of this process is somebody's. */
static void check_fds(struct sim *sim)
{
    int expected = sim->idle_fds + (int)sim->host.process_count;

    for (const struct trust_domain *domain = sim->daemon.domains.first; domain;
         domain = domain->next)
        expected += (int)domain->store.segment_count + 1; /* and its record */
    for (const struct guest *guest = sim->daemon.registry.first; guest; guest = guest->next)
        expected += guest->death.fd >= 0;
    for (uint32_t i = 0; i < SIM_VMMS; i++)
        expected += (int)sim->vmms[i].segment_count + 2 * (sim->vmms[i].fd >= 0);
    if (sim_check_count_fds() != expected)
        sim_wrong(sim, "%d descriptors are open, %d are somebody's", sim_check_count_fds(),
                  expected);
}

void sim_check_rest(struct sim *sim)
{
    json_t *status = status_of_host(&sim->daemon);

    for (uint32_t i = 0; i < SIM_VMMS; i++) {
        if (sim->vmms[i].link != SIM_SERVED)
            continue;
        check_guest(&sim->vmms[i], status);
        check_member(&sim->vmms[i]);
        check_shared_bytes(&sim->vmms[i]);
    }
    check_sharing(sim, status);
    json_decref(status);
    check_segments(sim);
    sim_check_tables(sim);
    check_fds(sim);
    if (sim->daemon.ledger.mismatches && !sim->options.liars)
        sim_wrong(sim, "the ledger does not add up, and everybody is honest");
}

void sim_check_empty(struct sim *sim)
{
    if (sim->daemon.registry.first)
        sim_wrong(sim, "guest '%s' is registered, and its process has ended",
                  sim->daemon.registry.first->name);
    if (sim->daemon.agents.first)
        sim_wrong(sim, "a session outlives its guest");
    if (sim->daemon.domains.budget.used_pages)
        sim_wrong(sim, "%" PRIu64 " pages of the store outlive their guests",
                  sim->daemon.domains.budget.used_pages);
    if (sim->daemon.ledger.first)
        sim_wrong(sim, "the ledger has accounts without guests");
    check_fds(sim);
}
