/* What a virtual machine is told and says of itself: who it is, its clock, its network, what it uses. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define HELD_WAIT_MS 5000

/* The first line of a file of the kernel; false if there is none. */
bool read_line(const char *path, char *line, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, line, size - 1);
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return false;
    line[n] = 0;
    line[strcspn(line, "\n")] = 0;
    return true;
}

/* The network card of this machine; false if it has none. */
bool find_link(char *name)
{
    char path[300];
    bool found = false;
    DIR *all = opendir("/sys/class/net");
    for (struct dirent *entry; all && !found && (entry = readdir(all));) {
        snprintf(path, sizeof path, "/sys/class/net/%s/device", entry->d_name);
        found = strlen(entry->d_name) < IFNAMSIZ && !access(path, F_OK);
        if (found)
            strcpy(name, entry->d_name);
    }
    if (all)
        closedir(all);
    return found;
}

uint64_t count_oom_kills(void)
{
    char text[16384];
    int fd = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = 0;
    const char *at = strstr(text, "\noom_kill ");
    return guest.pressure_kills + (at ? strtoull(at + 10, NULL, 10) : 0);
}

int show_usage(void)
{
    struct sysinfo memory;
    struct statvfs disk;
    char processes[32] = "0";
    struct bytes out = {0};
    if (sysinfo(&memory) || statvfs("/", &disk))
        return applet_failed("usage");
    char path[320];
    snprintf(path, sizeof path, "%s/pids.current", guest.group);
    read_line(path, processes, sizeof processes);
    put_number(&out, T_SIZE, (uint64_t)(memory.totalram - memory.freeram) * memory.mem_unit);
    put_number(&out, T_PID, strtoull(processes, NULL, 10));
    put_number(&out, T_LENGTH, (uint64_t)(disk.f_blocks - disk.f_bfree) * disk.f_frsize);
    put_number(&out, T_OOM_KILLS, count_oom_kills());
    bool written = write(1, out.data, out.length) == (ssize_t)out.length;
    bytes_free(&out);
    return written ? 0 : applet_failed("usage");
}

static const char *write_file(const struct field *field)
{
    const char *name = (const char *)field->value, *end = name + field->length;
    const char *content = memchr(name, 0, field->length);
    char path[300];
    errno = EINVAL;
    if (!content || strchr(name, '/') || snprintf(path, sizeof path, "/etc/%s", name) >= (int)sizeof path)
        return "name of a file";
    content++;
    mkdir("/etc", 0755);
    unlink(path); /* it may be a link */
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    bool written = fd >= 0 && write(fd, content, (size_t)(end - content)) == end - content;
    if (fd >= 0)
        close(fd);
    return written ? NULL : "a file in /etc";
}

static const char *new_boot_id(void)
{
    uint8_t id[16];
    char text[40];
    if (getrandom(id, sizeof id, 0) != sizeof id)
        return "random numbers";
    id[6] = (uint8_t)((id[6] & 0x0f) | 0x40); /* RFC 9562, version 4 */
    id[8] = (uint8_t)((id[8] & 0x3f) | 0x80);
    char *at = text;
    for (int i = 0; i < 16; i++)
        at += sprintf(at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", id[i]);
    *at++ = '\n';
    return pwrite(guest.boot_id_file, text, (size_t)(at - text), 0) == at - text ? NULL : "id of the boot";
}

/* Two machines that were one have the same random numbers to come: not after this. */
static const char *take_seed(const struct field *field)
{
    struct { struct rand_pool_info info; uint8_t data[64]; } pool = {0};
    size_t length = field->length < sizeof pool.data ? field->length : sizeof pool.data;
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    pool.info.entropy_count = (int)(8 * length);
    pool.info.buf_size = (int)length;
    memcpy(pool.data, field->value, length);
    bool taken = fd >= 0 && ioctl(fd, RNDADDENTROPY, &pool) == 0 && ioctl(fd, RNDRESEEDCRNG) == 0;
    if (fd >= 0)
        close(fd);
    return taken ? NULL : "random numbers";
}

static char link_name[IFNAMSIZ];

/* As ioctl(2) takes it: the name of a link, and an address. */
static struct ifreq link_request(const char *address)
{
    struct ifreq request = {0};
    memcpy(request.ifr_name, link_name, sizeof link_name);
    struct sockaddr_in *at = (struct sockaddr_in *)&request.ifr_addr;
    at->sin_family = AF_INET;
    if (address)
        inet_pton(AF_INET, address, &at->sin_addr);
    return request;
}

static bool read_hardware(const char *text, unsigned char *hardware)
{
    return sscanf(text, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &hardware[0], &hardware[1], &hardware[2],
                  &hardware[3], &hardware[4], &hardware[5]) == 6;
}

static bool add_route(int fd, const char *target, const char *mask, const char *gateway)
{
    struct rtentry route = {.rt_flags = RTF_UP | (gateway ? RTF_GATEWAY : RTF_HOST), .rt_dev = link_name};
    struct { struct sockaddr *at; const char *text; } parts[] = {
        {&route.rt_dst, target}, {&route.rt_genmask, mask}, {&route.rt_gateway, gateway}};
    for (int i = 0; i < 3; i++) {
        struct sockaddr_in address = {.sin_family = AF_INET};
        if (parts[i].text)
            inet_pton(AF_INET, parts[i].text, &address.sin_addr);
        memcpy(parts[i].at, &address, sizeof address);
    }
    return ioctl(fd, SIOCADDRT, &route) == 0;
}

/* One address, and one neighbour, by which all else goes; what was set before goes with the link. */
static const char *set_network(const char *text)
{
    char own[16], gateway[16], own_hardware[18], gateway_hardware[18];
    int mtu;
    errno = ENODEV;
    if (!find_link(link_name))
        return "network card";
    struct ifreq link = link_request(NULL);
    struct arpreq neighbour = {.arp_flags = ATF_COM | ATF_PERM};
    memcpy(neighbour.arp_dev, link_name, sizeof link_name);
    errno = EINVAL;
    if (sscanf(text, "%15s %15s %17s %17s %d", own, gateway, own_hardware, gateway_hardware, &mtu) != 5 ||
        !read_hardware(gateway_hardware, (unsigned char *)neighbour.arp_ha.sa_data))
        return "text of the network";
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    link.ifr_flags = 0;
    bool set = fd >= 0 && ioctl(fd, SIOCSIFFLAGS, &link) == 0;
    link = link_request(NULL);
    link.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    set = set && read_hardware(own_hardware, (unsigned char *)link.ifr_hwaddr.sa_data) &&
          ioctl(fd, SIOCSIFHWADDR, &link) == 0;
    link = link_request(NULL);
    link.ifr_mtu = mtu;
    set = set && ioctl(fd, SIOCSIFMTU, &link) == 0;
    link = link_request(own);
    set = set && ioctl(fd, SIOCSIFADDR, &link) == 0;
    link = link_request("255.255.255.255");
    set = set && ioctl(fd, SIOCSIFNETMASK, &link) == 0;
    link = link_request(NULL);
    link.ifr_flags = IFF_UP;
    set = set && ioctl(fd, SIOCSIFFLAGS, &link) == 0;
    set = set && (add_route(fd, gateway, "255.255.255.255", NULL) || errno == EEXIST);
    memcpy(&neighbour.arp_pa, &(struct sockaddr_in){.sin_family = AF_INET}, sizeof(struct sockaddr_in));
    inet_pton(AF_INET, gateway, &((struct sockaddr_in *)&neighbour.arp_pa)->sin_addr);
    neighbour.arp_ha.sa_family = ARPHRD_ETHER;
    set = set && ioctl(fd, SIOCSARP, &neighbour) == 0 && (add_route(fd, "0.0.0.0", "0.0.0.0", gateway) || errno == EEXIST);
    if (fd >= 0) {
        int error = errno;
        close(fd);
        errno = error;
    }
    return set ? NULL : "network";
}

static const char *set_time(uint64_t ns)
{
    struct timespec now = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    return clock_settime(CLOCK_REALTIME, &now) ? "clock" : NULL;
}

static bool are_held(void)
{
    char text[256];
    ssize_t n = pread(guest.events, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    return strstr(text, "frozen 1") != NULL;
}

/* Held, commands see nothing of what happens to the machine meanwhile: that it is copied, and becomes another. */
static const char *hold_commands(bool held)
{
    if (write(guest.freezer, held ? "1" : "0", 1) != 1)
        return "freezer of commands";
    for (int waited = 0; held && !are_held(); waited++) {
        if (waited == HELD_WAIT_MS) {
            (void)!write(guest.freezer, "0", 1);
            errno = ETIMEDOUT;
            return "commands that do not stand still";
        }
        usleep(1000);
    }
    return NULL;
}

const char *settle_machine(const uint8_t *payload, size_t length)
{
    const uint8_t *at = payload;
    const char *wrong = NULL;
    struct field field;
    bool broken = false, another = false;
    while (!wrong && next_field(&at, payload + length, &field, &broken)) {
        switch (field.tag) {
        case T_HOSTNAME:
            another = true; /* than it was, where it has a name already */
            if (sethostname((const char *)field.value, field.length))
                wrong = "hostname";
            break;
        case T_FILE: wrong = write_file(&field); break;
        case T_ADJUST: wrong = set_time(clock_ns(CLOCK_REALTIME) + read_number(field.value, field.length)); break;
        case T_TIME: wrong = set_time(read_number(field.value, field.length)); break;
        case T_SEED: wrong = take_seed(&field); break;
        case T_NETWORK: {
            char *text = field_text(&field);
            wrong = text ? set_network(text) : "text of the network";
            free(text);
            break;
        }
        case T_HELD: wrong = hold_commands(read_number(field.value, field.length) != 0); break;
        default: errno = EINVAL; wrong = "a field that does not belong there";
        }
    }
    if (!wrong && another)
        wrong = new_boot_id(); /* of the new random numbers */
    if (broken)
        errno = EINVAL;
    return broken ? "fields that go beyond the frame" : wrong;
}
