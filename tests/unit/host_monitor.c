/* SPDX-License-Identifier: Apache-2.0 */
/* The path of a monitor is what somebody said: whoever listens there is looked at first. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon.h"
#include "monitor.h"

static char directory[] = "/tmp/unit_monitor.XXXXXX";
static struct guest guest;
static int listener;

static void set_up(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    cr_assert(mkdtemp(directory));
    memset(&guest, 0, sizeof(guest));
    snprintf(guest.qmp, sizeof(guest.qmp), "%s/qmp", directory);
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/qmp", directory);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cr_assert(bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0);
    cr_assert(listen(listener, 1) == 0);
}

static void tear_down(void)
{
    char path[64];

    close(listener);
    snprintf(path, sizeof(path), "%s/qmp", directory);
    unlink(path);
    rmdir(directory);
}

TestSuite(host_monitor, .init = set_up, .fini = tear_down);

Test(host_monitor, its_own_vmm_listens)
{
    int fd = -1;

    guest.pid = getpid();
    cr_assert(monitor_connect(&guest, &fd) == 0 && fd >= 0);
    close(fd);
}

Test(host_monitor, somebody_else_listens)
{
    int fd = -1;

    guest.pid = getppid();
    cr_expect(monitor_connect(&guest, &fd) == -EPERM && fd == -1);
    guest.pid = 0; /* not known */
    cr_expect(monitor_connect(&guest, &fd) == -EPERM && fd == -1);
}

Test(host_monitor, nobody_listens)
{
    int fd = -1;

    guest.pid = getpid();
    close(listener);
    cr_expect(monitor_connect(&guest, &fd) == -ENOENT);
    strcat(guest.qmp, ".not");
    cr_expect(monitor_connect(&guest, &fd) == -ENOENT);
    guest.qmp[0] = '\0';
    cr_expect(monitor_connect(&guest, &fd) == -ENOENT);
    memset(guest.qmp, 'a', sizeof(guest.qmp) - 1);
    cr_expect(monitor_connect(&guest, &fd) == -ENOENT && fd == -1);
}

Test(host_monitor, place_for_one_that_arrives_is_its_users_alone)
{
    static struct daemon daemon;
    char path[GUEST_WORDS], place[128];
    struct stat st;

    snprintf(daemon.config.socket, sizeof(daemon.config.socket), "%s/memd.sock", directory);
    cr_assert(monitor_make_place(&daemon, "db1", geteuid(), path));
    snprintf(place, sizeof(place), "%s/db1.vmm", directory);
    cr_expect(strncmp(path, place, strlen(place)) == 0 &&
              strcmp(path + strlen(place), "/qmp") == 0);
    cr_assert(stat(place, &st) == 0 && (st.st_mode & 0777) == 0700 && st.st_uid == geteuid());
    cr_expect(monitor_make_place(&daemon, "db1", geteuid(), path), "it is there already");
    rmdir(place);
    cr_assert(symlink("/tmp", place) == 0);
    cr_expect(!monitor_make_place(&daemon, "db1", geteuid(), path), "somebody's link was taken");
    unlink(place);
}
