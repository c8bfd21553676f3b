// Faults on demand, and what a caller can learn about the last error.
//
// HOST_CANN_FAULTS holds rules, or `@FILE` that holds them; rules are separated by line ends or `;`:
//     call=aclrtSynchronizeStream code=507054 nth=3 rank=1
// call: the entry point. code: what it returns. nth: which of this process's calls of it since the rule was read
// (1 by default). times: how many calls in a row fail (1; 0: all from then on). rank: only where RANK is that (all).
// later: 1 for a call that gives a stream work: it succeeds, and the stream fails when its turn comes.
// text: one word for aclGetRecentErrMsg. A file is read again whenever it changes.
//
// A rule that could never be planted ends the process: a drill whose fault is not planted would pass for no reason.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "codes.inc"  // WHEEL_CODES, made by build.py
#include "runtime.h"

namespace host_cann {
namespace {

struct Rule {
  std::string call, text;
  Error code = SUCCESS;
  long nth = 1, times = 1, rank = -1, seen = 0;
  bool later = false;
};

struct Rules {
  std::mutex mutex;
  std::vector<Rule> rules;
  std::string stamp;
};

Rules& rules() {
  static Rules* all = new Rules;  // never destroyed: streams may outlive the process's static objects
  return *all;
}

// By name, whether the call gives a stream work.
std::map<std::string, bool>& calls() {
  static auto* all = new std::map<std::string, bool>;
  return *all;
}

// What is wrong with a rule, where, and how it is mended.
std::runtime_error unplanted(const std::string& what, const std::string& where, const std::string& mend) {
  return std::runtime_error("host_cann: HOST_CANN_FAULTS: " + what + "\n  where: " + where + "\n  mend:  " + mend);
}

// The known call that shares the longest beginning with a name.
std::string nearest(const std::string& name) {
  std::string best;
  size_t most = 0;
  for (const auto& [call, _] : calls()) {
    size_t same = 0;
    while (same < std::min(call.size(), name.size()) && call[same] == name[same]) ++same;
    if (best.empty() || same > most) most = same, best = call;
  }
  return best;
}

// Raises std::runtime_error where the rule is for nothing that could happen.
void check(const Rule& rule, const std::string& line) {
  static const std::set<long> codes(std::begin(WHEEL_CODES), std::end(WHEEL_CODES));
  const auto call = calls().find(rule.call);
  if (rule.call.empty() || rule.code == SUCCESS) {
    throw unplanted("a rule needs call= and code=", line, "call=aclrtMalloc code=207001");
  }
  if (call == calls().end()) {
    throw unplanted("no call is named " + rule.call, line,
                    "did you mean " + nearest(rule.call) + "? It must be an entry point with CALLED in host_cann/src, "
                    "or an operator that is computed there");
  }
  if (!codes.count(rule.code)) {
    throw unplanted(std::to_string(rule.code) + " is no code that torch_npu or its documentation knows", line,
                    "take one of NPUErrorCodes.h in the wheel, 107020 or 507054");
  }
  if (rule.nth < 1 || rule.times < 0) {
    throw unplanted("no call would ever fail", line, "count calls from nth=1; times=0 stands for all from then on");
  }
  if (rule.later && !call->second) {
    throw unplanted(rule.call + " gives no stream work, so that nothing can fail later", line, "leave out later=1");
  }
}

Rule parse(const std::string& line) {
  Rule rule;
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    auto at = word.find('=');
    std::string key = word.substr(0, at), value = at == std::string::npos ? "" : word.substr(at + 1);
    char* end = nullptr;
    long number = std::strtol(value.c_str(), &end, 10);
    bool whole = !value.empty() && *end == 0;
    if (key == "call") rule.call = value;
    else if (key == "text") rule.text = value;
    else if (key == "code" && whole) rule.code = static_cast<Error>(number);
    else if (key == "nth" && whole) rule.nth = number;
    else if (key == "times" && whole) rule.times = number;
    else if (key == "rank" && whole && number >= 0) rule.rank = number;
    else if (key == "later" && whole) rule.later = number != 0;
    else throw unplanted("cannot read " + word, line, "write NAME=VALUE: call and text, and as numbers code, nth,"
                          " times, rank and later");
  }
  check(rule, line);
  return rule;
}

std::vector<Rule> parse_all(std::string text) {
  for (char& c : text) c = c == ';' ? '\n' : c;
  std::vector<Rule> found;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.find_first_not_of(" \t\r") != std::string::npos) found.push_back(parse(line));
  }
  return found;
}

// Read the rules where they are new. Under the mutex. Raises std::runtime_error.
void refresh(Rules& all) {
  const char* given = std::getenv("HOST_CANN_FAULTS");
  std::string source = given ? given : "", stamp = source;
  const bool filed = source.rfind('@', 0) == 0;
  const std::string path = filed ? source.substr(1) : "";
  if (filed) {
    struct stat about {};
    if (stat(path.c_str(), &about) || !S_ISREG(about.st_mode) || access(path.c_str(), R_OK)) {
      throw unplanted("no such file, or none that can be read", path,
                      "make it before the program starts; an empty one holds no faults");
    }
    stamp += std::to_string(about.st_ino) + " " + std::to_string(about.st_size) + " " +
             std::to_string(about.st_mtim.tv_sec) + "." + std::to_string(about.st_mtim.tv_nsec);
  }
  if (stamp == all.stamp) return;
  if (filed) {
    std::ifstream file(path);
    std::ostringstream text;
    text << file.rdbuf();
    source = text.str();
  }
  all.rules = parse_all(source);
  all.stamp = stamp;
}

thread_local Error last_error = SUCCESS;

struct Message {
  std::mutex mutex;
  std::string text;
};

Message& message() {
  static Message* its = new Message;
  return *its;
}

}  // namespace

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  if (!text || !*text) return otherwise;
  char* end = nullptr;
  long number = std::strtol(text, &end, 10);
  if (*end != 0 || number < 0) {
    std::fprintf(stderr, "host_cann: %s=%s is no number\n", name, text);
    std::abort();  // without its jitter, or with no device, a test would show something else than it says
  }
  return number;
}

Error fail(Error code, const std::string& text) {
  last_error = code;
  Message& kept = message();
  std::lock_guard<std::mutex> lock(kept.mutex);
  kept.text = text;
  return code;
}

Error fail_again(Error code, const std::string& otherwise) {
  last_error = code;
  Message& kept = message();
  std::lock_guard<std::mutex> lock(kept.mutex);
  if (kept.text.empty()) kept.text = otherwise;
  return code;
}

void know(const Entry* from, const Entry* to) {
  for (; from != to; ++from) calls()[from->name] = from->on_stream;
}

HOST_CANN_ENTRIES()

Verdict called(const char* name) {
  static const bool armed = std::getenv("HOST_CANN_FAULTS") != nullptr;
  if (!armed) return {};
  Rules& all = rules();
  std::lock_guard<std::mutex> lock(all.mutex);
  try {
    refresh(all);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    std::abort();
  }
  const long rank = setting("RANK", 0);
  for (Rule& rule : all.rules) {
    if (rule.call != name || (rule.rank >= 0 && rule.rank != rank)) continue;
    ++rule.seen;
    if (rule.seen < rule.nth || (rule.times > 0 && rule.seen >= rule.nth + rule.times)) continue;
    std::string text = rule.text + (rule.text.empty() ? "" : " ") + "host_cann: injected " + std::to_string(rule.code) +
                       " in " + name + ", call " + std::to_string(rule.seen) + ", rank " + std::to_string(rank);
    std::fprintf(stderr, "%s\n", text.c_str());
    fail(rule.code, text);
    return {rule.code, rule.later};
  }
  return {};
}

Error refuse(const char* name) {
  std::string text = std::string("host_cann: ") + name + " is not there: this stand-in computes nothing itself, and the "
                     "operator was not redirected to a CPU kernel";
  std::fprintf(stderr, "%s\n", text.c_str());
  return fail(REFUSED_CALL, text);
}

}  // namespace host_cann

using namespace host_cann;

// For `python -m host_cann run`: what is wrong with HOST_CANN_FAULTS, or null.
EXPORT const char* host_cann_faults_problem() {
  static std::string text;
  try {
    Rules now;
    refresh(now);
    return nullptr;
  } catch (const std::runtime_error& error) {
    text = error.what();
    return text.c_str();
  }
}

EXPORT const char* aclGetRecentErrMsg() {
  thread_local std::string shown;
  Message& kept = message();
  std::lock_guard<std::mutex> lock(kept.mutex);
  shown.swap(kept.text);
  kept.text.clear();
  return shown.c_str();
}

EXPORT Error aclrtPeekAtLastError(int) { return last_error; }

EXPORT Error aclrtGetLastError(int) {
  Error code = last_error;
  last_error = SUCCESS;
  return code;
}
