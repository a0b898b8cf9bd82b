/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The chart of analyze: a stacked bar for each source and for all together, in shares of its
 * memory, with the sizes beside it. It is made to be printed: generic fonts, no script, nothing
 * fetched, and four colours whose lightness alone tells them apart (about 96, 72, 46 and 17 of
 * 100), so that it survives a grey printer and every kind of colour blindness.
 */
#include <stdio.h>
#include <string.h>

#include "analyze_report.h"
#include "ctl.h"

/* In user units, which are CSS pixels unless the page says otherwise. */
#define WIDTH          720.0
#define MARGIN         12.0
#define LEGEND_HEIGHT  34.0
#define ROW_HEIGHT     26.0
#define BAR_HEIGHT     18.0
#define GROUP_GAP      10.0 /* between the sources and what is said of all of them */
#define AXIS_HEIGHT    52.0
#define NOTE_HEIGHT    16.0
#define CHARACTER      7.0 /* width of a character of the labels, roughly */
#define LABEL_CHARS    26U /* longer names lose their middle */
#define NUMBERS_WIDTH  128.0
#define NUMBER_PERCENT 7.5 /* a piece of less has no room for its number */

/* Of a bar, from left to right. */
enum { PIECE_ZERO, PIECE_WITHIN, PIECE_BETWEEN, PIECE_UNIQUE, PIECES };

static const struct {
    const char *label, *fill, *text; /* text: the colour of the number inside */
} pieces[PIECES] = {
    [PIECE_ZERO] = {"zero", "#f4f4f4", "#222222"},
    [PIECE_WITHIN] = {"duplicates within a source", "#e6a532", "#222222"},
    [PIECE_BETWEEN] = {"duplicates between sources", "#0072b2", "#ffffff"},
    [PIECE_UNIQUE] = {"unique", "#1b2a49", "#ffffff"},
};

struct bar {
    const char *label;
    uint64_t units[PIECES];
    uint64_t saved; /* units */
};

struct chart {
    FILE *file;
    double left, right; /* of the bars */
    double y;           /* of the next row */
};

/* ---- text ---- */

/* Bytes of the UTF-8 character at `text`; 0 where there is none that XML may hold. */
static size_t character_bytes(const char *text)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    const uint8_t *bytes = (const uint8_t *)text;
    size_t count = bytes[0] < 0x80 ? 1 : bytes[0] < 0xe0 ? 2 : bytes[0] < 0xf0 ? 3 : 4;
    uint32_t code = count == 1 ? bytes[0] : bytes[0] & (0x7fU >> count);

    if ((bytes[0] >= 0x80 && bytes[0] < 0xc2) || bytes[0] > 0xf4)
        return 0;
    for (size_t i = 1; i < count; i++) {
        if ((bytes[i] & 0xc0) != 0x80)
            return 0;
        code = code << 6 | (bytes[i] & 0x3f);
    }
    if (code < 0x20 || code == 0x7f || code < least[count] || code > 0x10ffff ||
        (code >= 0xd800 && code < 0xe000) || (code & 0xfffe) == 0xfffe)
        return 0;
    return count;
}

static void write_character(FILE *file, const char *text, size_t bytes)
{
    switch (bytes ? text[0] : '\0') {
    case '\0': /* no character that XML may hold */ fputs("\xef\xbf\xbd", file); break;
    case '<': fputs("&lt;", file); break;
    case '>': fputs("&gt;", file); break;
    case '&': fputs("&amp;", file); break;
    case '"': fputs("&quot;", file); break;
    default: fwrite(text, 1, bytes, file);
    }
}

static size_t count_characters(const char *text)
{
    size_t count = 0;

    for (; *text; count++) {
        size_t bytes = character_bytes(text);

        text += bytes ? bytes : 1;
    }
    return count;
}

/* At most LABEL_CHARS characters: of a path the end says more than the beginning, of a guest's name
 * the beginning, so that it is the middle that goes. */
static void write_label(FILE *file, const char *text)
{
    size_t count = count_characters(text), head = count, tail = count;

    if (count > LABEL_CHARS) {
        head = LABEL_CHARS / 3;
        tail = count - (LABEL_CHARS - head - 1);
    }
    for (size_t i = 0; i < count; i++) {
        size_t bytes = character_bytes(text);

        if (i == head)
            fputs("\xe2\x80\xa6", file); /* an ellipsis */
        if (i < head || i >= tail)
            write_character(file, text, bytes);
        text += bytes ? bytes : 1;
    }
}

/* ---- bars ---- */

static double x_of(const struct chart *chart, double share)
{
    return chart->left + (chart->right - chart->left) * share;
}

static void write_piece(const struct chart *chart, int which, double from, double to)
{
    double x = x_of(chart, from), width = x_of(chart, to) - x;
    double percent = 100 * (to - from);

    if (width <= 0)
        return;
    fprintf(chart->file,
            "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\" "
            "stroke=\"#222222\" stroke-width=\"0.6\"/>\n",
            x, chart->y, width, BAR_HEIGHT, pieces[which].fill);
    if (percent >= NUMBER_PERCENT)
        fprintf(chart->file,
                "<text x=\"%.2f\" y=\"%.2f\" text-anchor=\"middle\" font-size=\"10\" "
                "fill=\"%s\">%.0f %%</text>\n",
                x + width / 2, chart->y + BAR_HEIGHT / 2 + 3.5, pieces[which].text, percent);
}

static void write_bar(struct chart *chart, const struct bar *bar, bool bold)
{
    const char *weight = bold ? " font-weight=\"bold\"" : "";
    uint64_t units = 0, done = 0;
    double text_y = chart->y + BAR_HEIGHT / 2 + 4;
    char size[CTL_SIZE_CHARS], percent[CTL_SIZE_CHARS];

    for (int i = 0; i < PIECES; i++)
        units += bar->units[i];
    fprintf(chart->file, "<text x=\"%.2f\" y=\"%.2f\" text-anchor=\"end\"%s>", chart->left - 8,
            text_y, weight);
    write_label(chart->file, bar->label);
    fputs("</text>\n", chart->file);
    for (int i = 0; units && i < PIECES; i++) {
        write_piece(chart, i, (double)done / (double)units,
                    (double)(done + bar->units[i]) / (double)units);
        done += bar->units[i];
    }
    fprintf(chart->file, "<text x=\"%.2f\" y=\"%.2f\" text-anchor=\"end\"%s>%s</text>\n",
            chart->right + 72, text_y, weight, ctl_format_size(units * PAGE_BYTES, size));
    fprintf(chart->file, "<text x=\"%.2f\" y=\"%.2f\" text-anchor=\"end\"%s>%s</text>\n",
            WIDTH - MARGIN, text_y, weight, ctl_format_percent(bar->saved, units, percent));
    chart->y += ROW_HEIGHT;
}

/* A source: what another source holds as well is a duplicate between the two. */
static struct bar source_bar(const struct analyze_report *report, size_t index)
{
    const struct analyze_counts *counts = &report->result->sources[index][ANALYZE_PAGES];

    return (struct bar){
        .label = report->sources[index].name,
        .units = {counts->zero, counts->intra, counts->common, counts->unique - counts->common},
        .saved = counts->units - ctl_analyze_kept(counts),
    };
}

/* All together, when they share in one of the ways; `common` contents are kept once. */
static struct bar all_bar(const struct analyze_report *report, int way, const char *label)
{
    const struct analyze_counts *counts = &report->result->all[ANALYZE_PAGES];
    uint64_t kept = ctl_analyze_what_if(report, ANALYZE_PAGES, way).kept;
    uint64_t unique = kept - (counts->zero > 0);

    return (struct bar){
        .label = label,
        .units = {counts->zero, counts->intra,
                  counts->units - counts->zero - counts->intra - unique, unique},
        .saved = counts->units - kept,
    };
}

/* ---- around the bars ---- */

static void write_legend(struct chart *chart)
{
    double x = MARGIN;

    for (int i = 0; i < PIECES; i++) {
        fprintf(chart->file,
                "<rect x=\"%.2f\" y=\"%.2f\" width=\"14\" height=\"12\" fill=\"%s\" "
                "stroke=\"#222222\" stroke-width=\"0.6\"/>\n",
                x, chart->y, pieces[i].fill);
        fprintf(chart->file, "<text x=\"%.2f\" y=\"%.2f\">%s</text>\n", x + 19, chart->y + 10.5,
                pieces[i].label);
        x += 19 + CHARACTER * (double)strlen(pieces[i].label) + 20;
    }
    fprintf(chart->file,
            "<text x=\"%.2f\" y=\"%.2f\" text-anchor=\"end\" font-size=\"10\">memory</text>\n"
            "<text x=\"%.2f\" y=\"%.2f\" text-anchor=\"end\" font-size=\"10\">saved</text>\n",
            chart->right + 72, chart->y + LEGEND_HEIGHT - 5, WIDTH - MARGIN,
            chart->y + LEGEND_HEIGHT - 5);
    chart->y += LEGEND_HEIGHT;
}

/* Thin lines behind the bars, and their numbers under them. */
static void write_axis(const struct chart *chart, double top, double bottom)
{
    for (int percent = 0; percent <= 100; percent += 20) {
        double x = x_of(chart, percent / 100.0);

        fprintf(chart->file,
                "<line x1=\"%.2f\" y1=\"%.2f\" x2=\"%.2f\" y2=\"%.2f\" stroke=\"#bbbbbb\" "
                "stroke-width=\"0.6\"/>\n"
                "<text x=\"%.2f\" y=\"%.2f\" text-anchor=\"middle\" font-size=\"10\">%d</text>\n",
                x, top, x, bottom + 4, x, bottom + 16, percent);
    }
    fprintf(chart->file,
            "<line x1=\"%.2f\" y1=\"%.2f\" x2=\"%.2f\" y2=\"%.2f\" stroke=\"#222222\"/>\n"
            "<text x=\"%.2f\" y=\"%.2f\" text-anchor=\"middle\">share of the memory, in pages of "
            "4 KiB (%%)</text>\n",
            chart->left, bottom, chart->right, bottom, (chart->left + chart->right) / 2,
            bottom + 33);
}

static void write_notes(const struct chart *chart)
{
    fprintf(
        chart->file,
        "<text x=\"%.2f\" y=\"%.2f\" font-size=\"10\" fill=\"#444444\">A page that another "
        "source holds, too, is a duplicate between sources in the bar of each of them; of all "
        "sources,</text>\n"
        "<text x=\"%.2f\" y=\"%.2f\" font-size=\"10\" fill=\"#444444\">one copy of each content "
        "counts as unique. Saved: what keeping each content and one zero page once leaves "
        "free.</text>\n",
        MARGIN, chart->y, MARGIN, chart->y + 13);
}

static size_t longest_label(const struct analyze_report *report)
{
    size_t longest = strlen("each on its own");

    for (size_t i = 0; i < report->source_count; i++) {
        size_t count = count_characters(report->sources[i].name);

        count = count < LABEL_CHARS ? count : LABEL_CHARS;
        longest = count > longest ? count : longest;
    }
    return longest;
}

static void write_bars(struct chart *chart, const struct analyze_report *report)
{
    bool several = report->source_count > 1;
    struct bar bar;

    for (size_t i = 0; several && i < report->source_count; i++) {
        bar = source_bar(report, i);
        write_bar(chart, &bar, false);
    }
    chart->y += several ? GROUP_GAP : 0;
    bar = all_bar(report, WHAT_IF_ONE_DOMAIN, several ? "all" : report->sources[0].name);
    write_bar(chart, &bar, several);
    if (report->options->domains) {
        bar = all_bar(report, WHAT_IF_THESE_DOMAINS, "these domains");
        write_bar(chart, &bar, true);
        bar = all_bar(report, WHAT_IF_EACH_ALONE, "each on its own");
        write_bar(chart, &bar, true);
    }
}

void ctl_analyze_write_svg(const struct analyze_report *report, FILE *file)
{
    bool several = report->source_count > 1;
    double rows = several ? (double)report->source_count + 1 : 1;
    double top = MARGIN + LEGEND_HEIGHT, bottom, height;
    struct chart chart = {
        .file = file,
        .left = MARGIN + CHARACTER * (double)longest_label(report) + 14,
        .right = WIDTH - MARGIN - NUMBERS_WIDTH,
        .y = MARGIN,
    };

    rows += report->options->domains ? 2 : 0;
    bottom = top + rows * ROW_HEIGHT + (several ? GROUP_GAP : 0);
    height = bottom + AXIS_HEIGHT + (several ? 2 * NOTE_HEIGHT : 0);
    fprintf(file,
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" "
            "viewBox=\"0 0 %.0f %.0f\" font-family=\"Helvetica, Arial, sans-serif\" "
            "font-size=\"12\" fill=\"#222222\" role=\"img\">\n"
            "<title>Content of memory pages</title>\n"
            "<desc>For each source the shares of zero pages, of duplicates within it, of pages "
            "that other sources hold, too, and of the others</desc>\n"
            "<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
            WIDTH, height, WIDTH, height);
    write_legend(&chart);
    write_axis(&chart, top - 4, bottom);
    write_bars(&chart, report);
    chart.y = bottom + AXIS_HEIGHT + 2;
    if (several)
        write_notes(&chart);
    fputs("</svg>\n", file);
}
