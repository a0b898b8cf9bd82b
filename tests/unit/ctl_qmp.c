/* SPDX-License-Identifier: Apache-2.0 */
/* The QMP client against VMMs that answer late, oddly, or not at all. */
#include <criterion/criterion.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "qmp.h"

#define GREETING "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n"
#define PATIENCE 10000 /* ms: never reached when all is well */

/* Says its first text on connection, and the next one after each line that it receives. */
struct vmm {
    char path[64];
    const char *const *texts;
    int listener;
    pthread_t thread;
};

static void say(int fd, const char *text)
{
    if (text)
        cr_assert(send(fd, text, strlen(text), MSG_NOSIGNAL) >= 0);
}

static void *serve(void *context)
{
    struct vmm *vmm = context;
    int fd = accept(vmm->listener, NULL, NULL);
    size_t next = 0;
    char byte;

    say(fd, vmm->texts[next++]);
    while (vmm->texts[next - 1] && read(fd, &byte, 1) == 1) {
        if (byte == '\n')
            say(fd, vmm->texts[next++]);
    }
    while (read(fd, &byte, 1) == 1)
        ;
    close(fd);
    return NULL;
}

static void start(struct vmm *vmm, const char *const texts[])
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    snprintf(vmm->path, sizeof(vmm->path), "/tmp/unit_qmp.%d", getpid());
    strcpy(address.sun_path, vmm->path);
    unlink(vmm->path);
    vmm->texts = texts;
    vmm->listener = socket(AF_UNIX, SOCK_STREAM, 0);
    cr_assert(bind(vmm->listener, (struct sockaddr *)&address, sizeof(address)) == 0);
    cr_assert(listen(vmm->listener, 1) == 0);
    pthread_create(&vmm->thread, NULL, serve, vmm);
}

static void stop(struct vmm *vmm, struct qmp *qmp)
{
    qmp_close(qmp);
    pthread_join(vmm->thread, NULL);
    close(vmm->listener);
    unlink(vmm->path);
}

Test(ctl_qmp, events_come_before_the_answer)
{
    struct qmp *qmp;
    json_t *result;
    struct vmm vmm;

    start(&vmm, (const char *const[]){
                    GREETING, "{\"event\": \"RESUME\"}\r\n{\"return\": {}}\r\n",
                    "{\"event\": \"STOP\"}\n{\"event\": \"RESET\"}\n{\"return\": {\"status\": "
                    "\"paused\"}}\n",
                    NULL});
    cr_assert(qmp_open(vmm.path, PATIENCE, &qmp) == 0);
    cr_assert(qmp_execute(qmp, "query-status", NULL, PATIENCE, &result) == 0);
    cr_expect_str_eq(json_string_value(json_object_get(result, "status")), "paused");
    json_decref(result);
    stop(&vmm, qmp);
}

Test(ctl_qmp, a_command_fails_and_the_next_one_works)
{
    struct qmp *qmp;
    json_t *result, *arguments = json_pack("{s:i}", "value", 1);
    struct vmm vmm;

    start(&vmm, (const char *const[]){GREETING, "{\"return\": {}}\n",
                                      "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no "
                                      "balloon\"}}\n",
                                      "{\"return\": 5}\n", NULL});
    cr_assert(qmp_open(vmm.path, PATIENCE, &qmp) == 0);
    cr_expect(qmp_execute(qmp, "balloon", arguments, PATIENCE, &result) == -EREMOTEIO);
    cr_expect_str_eq(qmp_error(qmp), "no balloon");
    cr_assert(qmp_execute(qmp, "balloon", arguments, PATIENCE, &result) == 0);
    cr_expect(json_integer_value(result) == 5);
    cr_expect_str_eq(qmp_error(qmp), "");
    json_decref(result);
    json_decref(arguments);
    stop(&vmm, qmp);
}

Test(ctl_qmp, another_client_is_connected_and_we_get_no_greeting)
{
    struct qmp *qmp;
    struct vmm vmm;

    start(&vmm, (const char *const[]){NULL});
    cr_expect(qmp_open(vmm.path, 50, &qmp) == -ETIMEDOUT);
    stop(&vmm, NULL);
}

Test(ctl_qmp, an_answer_that_comes_too_late)
{
    struct qmp *qmp;
    json_t *result;
    struct vmm vmm;

    start(&vmm, (const char *const[]){GREETING, "{\"return\": {}, \"id\": 1}\n", "",
                                      "{\"return\": 2, \"id\": 2}\n{\"error\": {}, \"id\": "
                                      "2}\n{\"return\": 3, \"id\": 3}\n",
                                      NULL});
    cr_assert(qmp_open(vmm.path, PATIENCE, &qmp) == 0);
    cr_expect(qmp_execute(qmp, "stop", NULL, 50, &result) == -ETIMEDOUT);
    /* It is not taken for that of the next command. */
    cr_assert(qmp_execute(qmp, "cont", NULL, PATIENCE, &result) == 0);
    cr_expect(json_integer_value(result) == 3);
    json_decref(result);
    stop(&vmm, qmp);
}

Test(ctl_qmp, what_answers_is_no_qemu)
{
    struct qmp *qmp;
    struct vmm vmm;

    start(&vmm, (const char *const[]){"SSH-2.0-OpenSSH\r\n", NULL});
    cr_expect(qmp_open(vmm.path, PATIENCE, &qmp) == -EPROTO);
    stop(&vmm, NULL);
    start(&vmm, (const char *const[]){"{\"hello\": 1}\n", NULL});
    cr_expect(qmp_open(vmm.path, PATIENCE, &qmp) == -EPROTO);
    stop(&vmm, NULL);
}

Test(ctl_qmp, a_line_without_end)
{
    static char flood[QMP_LINE_BYTES + 4096];
    struct qmp *qmp;
    struct vmm vmm;

    memset(flood, ' ', sizeof(flood) - 1);
    start(&vmm, (const char *const[]){flood, NULL});
    cr_expect(qmp_open(vmm.path, PATIENCE, &qmp) == -EPROTO);
    stop(&vmm, NULL);
}

Test(ctl_qmp, nobody_listens)
{
    char path[200];
    struct qmp *qmp;

    cr_expect(qmp_open("/tmp/no.such.qmp", PATIENCE, &qmp) == -ENOENT);
    memset(path, 'a', sizeof(path));
    path[sizeof(path) - 1] = '\0';
    cr_expect(qmp_open(path, PATIENCE, &qmp) == -ENAMETOOLONG);
}
