#define ATTEND attend_baseline
#define GROUP group_baseline
#define NAME name_baseline
#include "attend.inc"
