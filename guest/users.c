/* Users and groups of the image, read from its files: they are the image's word, not ours, and are only
 * used for the image's own processes. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

#define LARGEST (1 << 20) /* bytes read of a file */

static char *read_file(const char *path)
{
    struct bytes text = {0};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return NULL;
    for (ssize_t n = 1; n > 0 && text.length < LARGEST; text.length += n > 0 ? (size_t)n : 0) {
        bytes_reserve(&text, 65536);
        n = read(fd, text.data + text.length, 65535);
    }
    close(fd);
    bytes_add(&text, "", 1);
    return (char *)text.data;
}

/* Split a line at colons, in place; how many fields there are. */
static int split(char *line, char **fields, int most)
{
    int count = 0;
    while (count < most && line) {
        fields[count++] = line;
        line = strchr(line, ':');
        if (line)
            *line++ = 0;
    }
    return count;
}

static bool number(const char *text, uint32_t *value)
{
    char *end;
    errno = 0;
    unsigned long parsed = strtoul(text, &end, 10);
    if (!*text || *end || errno || parsed >= UINT32_MAX || *text == '-')
        return false;
    *value = (uint32_t)parsed;
    return true;
}

/* The line of a name or an id. */
static bool find_passwd(const char *text, struct user *user, char *name, size_t size)
{
    char *content = read_file("/etc/passwd"), *position = NULL, *fields[7];
    bool found = false;
    for (char *line = content ? strtok_r(content, "\n", &position) : NULL; line && !found;
         line = strtok_r(NULL, "\n", &position)) {
        uint32_t uid, gid;
        if (split(line, fields, 7) < 6 || !number(fields[2], &uid) || !number(fields[3], &gid))
            continue;
        char id[16];
        snprintf(id, sizeof id, "%u", uid);
        if (strcmp(fields[0], text) && strcmp(id, text))
            continue;
        found = true;
        user->uid = uid;
        user->gid = gid;
        snprintf(user->home, sizeof user->home, "%s", fields[5]);
        snprintf(name, size, "%s", fields[0]);
    }
    free(content);
    return found;
}

static bool is_member(const char *members, const char *name)
{
    size_t length = strlen(name);
    for (; members && *members; members += strcspn(members, ",") + (members[strcspn(members, ",")] != 0))
        if (strcspn(members, ",") == length && !strncmp(members, name, length))
            return true;
    return false;
}

/* Add the groups that name this member; where `wanted` is given, find that group's id instead. */
static bool find_groups(const char *member, const char *wanted, struct user *user)
{
    char *content = read_file("/etc/group"), *position = NULL, *fields[4];
    bool found = false;
    for (char *line = content ? strtok_r(content, "\n", &position) : NULL; line && !found;
         line = strtok_r(NULL, "\n", &position)) {
        uint32_t gid;
        if (split(line, fields, 4) < 4 || !number(fields[2], &gid))
            continue;
        if (wanted) {
            found = !strcmp(fields[0], wanted);
            user->gid = found ? gid : user->gid;
        } else if (user->group_count < 64 && gid != user->gid && is_member(fields[3], member)) {
            user->groups[user->group_count++] = gid;
        }
    }
    free(content);
    return found;
}

const char *find_user(const char *text, struct user *user)
{
    char who[256], name[256] = "";
    *user = (struct user){.home = "/"};
    size_t length = strcspn(text, ":");
    const char *group = text[length] ? text + length + 1 : NULL;
    if (length >= sizeof who)
        return "a user name that is too long";
    memcpy(who, text, length);
    who[length] = 0;
    bool known = find_passwd(who, user, name, sizeof name);
    if (!known && !number(who, &user->uid))
        return "no such user in the image";
    if (!known)
        user->gid = user->uid;
    if (!known && user->uid == 0)
        snprintf(user->home, sizeof user->home, "/root");
    if (group && !number(group, &user->gid) && !find_groups(NULL, group, user))
        return "no such group in the image";
    user->groups[user->group_count++] = user->gid;
    if (known)
        find_groups(name, NULL, user);
    return NULL;
}
